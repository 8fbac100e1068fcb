import pytest
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

import esft
from esft.checkpoint import load as loading
from esft.checkpoint.load import load_model, load_tokenizer
from tests.esft.checkpoint.files import rewrite, rewrite_json
from tests.esft.models import save_tiny, tiny_model, tiny_tokenizer


def lose(*names: str):
    return lambda base: rewrite(base, lambda tensors: [tensors.pop(name) for name in names])


def truncate(base):
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])


OUTPUTS = [f"model.layers.{layer}.self_attn.o_proj.weight" for layer in range(3)]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lose(OUTPUTS[0]), rf"base: tensor {OUTPUTS[0]} is missing \(1 missing in all\)$"),
        (lose(*reversed(OUTPUTS)), rf"base: tensor {OUTPUTS[0]} is missing \(3 missing in all\)$"),
        (truncate, r"base: cannot load a model \(."),
        (lambda base: (base / "config.json").write_text("{"), r"base: cannot load a model \(."),
        (lambda base: (base / "config.json").unlink(), r"base: cannot load a model \(."),
    ],
    ids=["missing tensor", "missing tensors", "truncated", "broken config", "no config"],
)
def test_a_damaged_model_is_refused(tmp_path, damage, message: str):
    base = save_tiny(tmp_path / "base")
    damage(base)
    with pytest.raises(esft.InputError, match=message):
        load_model(str(base))


@pytest.mark.parametrize("kind", [OSError, ValueError, RuntimeError, KeyError, SafetensorError])
def test_whatever_transformers_says_of_a_model_is_said_in_one_line(monkeypatch, kind: type[Exception]):
    def fails(*_, **__):
        raise kind("\nno good\nand here is why") if kind is not KeyError else KeyError("no good")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fails)
    with pytest.raises(esft.InputError, match=r"^some/where: cannot load a model \('?no good'?\)$"):
        load_model("some/where")


def test_a_model_is_loaded_where_and_as_the_device_says(monkeypatch):
    asked = []

    def loads(path, **options):
        asked.append((path, options))
        return model, {"missing_keys": []}

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", loads)
    monkeypatch.setattr(loading, "placement", lambda: {"device_map": "somewhere"})
    monkeypatch.setattr(loading, "compute_dtype", lambda dtype: f"computed {dtype}")
    model = tiny_model().train()
    assert load_model("base") is model
    assert not model.training
    load_model("base", "bfloat16")
    same = {"output_loading_info": True, "device_map": "somewhere"}
    assert asked == [("base", same | {"dtype": f"computed {dtype}"}) for dtype in ("auto", "bfloat16")]
    model.lm_head.to("meta")
    with pytest.raises(esft.InputError, match=r"^base: does not fit the memory of the GPUs \(lm_head\.weight would"):
        load_model("base")


def test_a_tokenizer_pads_with_its_own_token_or_else_with_the_end_marker(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path / "own")
    assert load_tokenizer(str(tmp_path / "own")).pad_token == "<|pad|>"
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "none")
    assert AutoTokenizer.from_pretrained(tmp_path / "none").pad_token is None
    assert load_tokenizer(str(tmp_path / "none")).pad_token == "<|end|>"


def test_a_tokenizer_without_a_chat_template_is_refused(tmp_path):
    base = save_tiny(tmp_path / "base")
    (base / "chat_template.jinja").unlink(missing_ok=True)
    rewrite_json(base / "tokenizer_config.json", lambda settings: settings.pop("chat_template", None))
    with pytest.raises(esft.InputError, match="base: the tokenizer has no chat template"):
        load_tokenizer(str(base))
    with pytest.raises(esft.InputError, match=r"absent: cannot load a tokenizer \(."):
        load_tokenizer(str(tmp_path / "absent"))


@pytest.mark.parametrize("kind", [OSError, ValueError])
def test_whatever_transformers_says_of_a_tokenizer_is_said_in_one_line(monkeypatch, kind: type[Exception]):
    def fails(*_, **__):
        raise kind("no good\nand here is why")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", fails)
    with pytest.raises(esft.InputError, match=r"^some/where: cannot load a tokenizer \(no good\)$"):
        load_tokenizer("some/where")

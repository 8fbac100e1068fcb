import json
import re

import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

import esft
from esft.checkpoint import load as loading
from esft.checkpoint.load import load_model, load_skeleton, load_tokenizer, load_without
from tests.esft.checkpoint.files import rewrite, rewrite_json
from tests.esft.models import save_tiny, tiny_model, tiny_tokenizer


def lose(*names: str):
    return lambda base: rewrite(base, lambda tensors: [tensors.pop(name) for name in names])


def quantised(base):
    change = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    rewrite_json(base / "config.json", lambda config: config.update(change))


def misshape(name: str):
    return lambda base: rewrite(base, lambda tensors: tensors.update({name: torch.ones(3, 5)}))


EXPERT = "model.layers.1.mlp.experts.0.up_proj.weight"
OUTPUTS = [f"model.layers.{layer}.self_attn.o_proj.weight" for layer in range(3)]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lose(OUTPUTS[0]), rf"base: tensor {OUTPUTS[0]} is missing \(1 missing in all\)$"),
        (lose(*reversed(OUTPUTS)), rf"base: tensor {OUTPUTS[0]} is missing \(3 missing in all\)$"),
        (lose(EXPERT), rf"base: tensor {EXPERT} is missing$"),
        (misshape(EXPERT), rf"base: tensor {EXPERT} has shape \(3, 5\), and the configuration's model has \(20, 32\)$"),
        (misshape("model.norm.weight"), r"base: tensor model\.norm\.weight has shape \(3, 5\), .* has \(32,\)$"),
        (quantised, r"config\.json: has a quantization_config, and no tensor is quantized; take it out$"),
    ],
    ids=["missing tensor", "missing tensors", "missing expert", "shape of an expert", "shape", "quantisation"],
)
def test_a_damaged_model_is_refused(tmp_path, damage, message: str):
    base = save_tiny(tmp_path / "base")
    damage(base)
    with pytest.raises(esft.InputError, match=message):
        load_model(str(base))


@pytest.fixture
def anywhere(monkeypatch):
    """Whatever a path names passes for a checkpoint."""
    for check in ("open_config", "weight_files", "check_folder", "check_dtypes"):
        monkeypatch.setattr(loading, check, lambda *_: None)


@pytest.mark.parametrize("kind", [OSError, ValueError, RuntimeError, KeyError, SafetensorError, ZeroDivisionError])
def test_whatever_transformers_says_of_a_model_is_said_in_one_line(anywhere, monkeypatch, kind: type[Exception]):
    def fails(*_, **__):
        raise kind("\nno good\nand here is why") if kind is not KeyError else KeyError("no good")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fails)
    with pytest.raises(esft.InputError, match=r"^some/where: cannot load a model \((KeyError ')?no good'?\)$"):
        load_model("some/where")


def test_a_model_is_loaded_where_and_as_the_device_says_and_from_safetensors(anywhere, monkeypatch):
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
    load_model("base", "bfloat16", trust_remote_code=True)
    same = {"output_loading_info": True, "device_map": "somewhere", "use_safetensors": True}
    assert asked == [
        ("base", same | {"dtype": f"computed {dtype}", "trust_remote_code": trusts})
        for dtype, trusts in (("auto", False), ("bfloat16", True))
    ]
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
    with pytest.raises(esft.InputError, match="absent: no such folder"):
        load_tokenizer(str(tmp_path / "absent"))


def test_a_tokenizer_without_a_vocabulary_is_refused(tmp_path):
    base = save_tiny(tmp_path / "base")
    rewrite_json(base / "tokenizer.json", lambda whole: whole["model"].update(vocab={}))
    with pytest.raises(esft.InputError, match="base: the tokenizer has no vocabulary$"):
        load_tokenizer(str(base))


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (5, "the chat template is 5, not a text"),
        ({"a": 1}, "the chat template is {'a': 1}, not a text"),
        ([1], "cannot load a tokenizer ('int' object is not subscriptable)"),
    ],
)
def test_a_chat_template_that_is_no_text_is_refused(tmp_path, template, said: str):
    tiny_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
    with pytest.raises(esft.InputError, match=f"^{re.escape(f'{tmp_path}: {said}')}$"):
        load_tokenizer(str(tmp_path))


def test_a_folder_without_a_tokenizer_or_with_half_of_one_is_named(tmp_path):
    for name, text in (("tokenizer.json", "{}"), ("tokenizer.json", "["), ("tokenizer_config.json", "[]")):
        base = save_tiny(tmp_path / "base")
        (base / name).write_text(text)
        with pytest.raises(esft.InputError, match=f"base/{name}: ."):
            load_tokenizer(str(base))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (base / name).unlink()
    with pytest.raises(esft.InputError, match=r"base: holds no tokenizer \(no tokenizer\.json\)$"):
        load_tokenizer(str(base))


def test_a_tokenizer_without_an_end_cannot_pad(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(esft.InputError, match="has neither a token for padding nor one for the end$"):
        load_tokenizer(str(tmp_path))


def test_a_skeleton_has_the_modules_and_no_weights(tmp_path):
    base = save_tiny(tmp_path / "base")
    skeleton = load_skeleton(str(base))
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    assert skeleton.state_dict().keys() == tiny_model().state_dict().keys()
    rewrite_json(base / "config.json", lambda config: config.update(hidden_act="unheard_of"))
    with pytest.raises(esft.InputError, match=r"base: its configuration makes no model \(."):
        load_skeleton(str(base))


@pytest.mark.parametrize("kind", [OSError, ValueError, KeyError])
def test_whatever_transformers_says_of_a_tokenizer_is_said_in_one_line(anywhere, monkeypatch, kind: type[Exception]):
    def fails(*_, **__):
        raise kind("no good\nand here is why")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", fails)
    with pytest.raises(esft.InputError, match=r"^some/where: cannot load a tokenizer \((KeyError ')?no good"):
        load_tokenizer("some/where")


def test_a_checkpoints_own_code_is_not_run_unless_said_so(base_config, monkeypatch):
    asked = []
    monkeypatch.setattr(loading, "open_config", lambda path, trusted: asked.append(trusted) or PreTrainedConfig())
    for library in (AutoModelForCausalLM, AutoTokenizer):
        for name in ("from_config", "from_pretrained"):
            monkeypatch.setattr(library, name, refuses(asked), raising=False)
    for load in (load_model, load_skeleton, load_tokenizer):
        for more, trusted in (((), False), ((True,), True)):
            asked.clear()
            with pytest.raises(esft.InputError, match="refused"):
                load(base_config, *(("auto",) if load is load_model and more else ()), *more)
            assert asked == [trusted] * (1 if load is load_tokenizer else 2)


@pytest.mark.parametrize("trusted", [False, True])
def test_a_part_of_a_model_is_made_by_a_checkpoints_own_code_only_where_that_may_run(base_config, monkeypatch, trusted):
    asked: list[bool] = []
    monkeypatch.setattr(loading, "open_config", lambda path, trusts: asked.append(trusts) or PreTrainedConfig())
    monkeypatch.setattr(loading, "load_in_part", refuses(asked))
    with pytest.raises(esft.InputError, match="refused"):
        load_without(base_config, lambda model: (), trust_remote_code=trusted)
    assert asked == [trusted] * 2


@pytest.mark.parametrize("trusted", [False, True])
def test_what_does_not_fit_is_looked_for_with_a_folders_own_code_only_where_that_may_run(
    anywhere, tmp_path, monkeypatch, trusted: bool
):
    asked = []
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuses([]))
    monkeypatch.setattr(loading.Checkpoint, "open", lambda path, trusts: asked.append(trusts))
    with pytest.raises(esft.InputError, match="refused"):
        load_model(str(tmp_path), trust_remote_code=trusted)
    assert asked == [trusted]


def refuses(asked: list[bool]):
    def loads(*_, trust_remote_code, **__):
        asked.append(trust_remote_code)
        raise ValueError("refused")

    return loads


@pytest.fixture
def base_config(tmp_path) -> str:
    return str(save_tiny(tmp_path / "base"))

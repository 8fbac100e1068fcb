import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import esft
from esft.checkpoint import load as loading
from esft.checkpoint.digest import model_digest
from esft.checkpoint.folder import Checkpoint
from esft.checkpoint.load import load_model, load_tokenizer
from esft.errors import first_line
from tests.esft import test_multimodal as multimodal
from tests.esft import zoo
from tests.esft.models import FAMILIES, save_tiny, tiny_model, tiny_tokenizer

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def rewrite(base: Path, change) -> None:
    """Change the tensors of a checkpoint's one file."""
    tensors = load_file(base / WEIGHTS)
    change(tensors)
    save_file(tensors, base / WEIGHTS, {"format": "pt"})


def rewrite_json(path: Path, change) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def shards(folder: Path) -> Path:
    tiny_model().save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_files_and_the_model_loaded_in_any_dtype_have_one_digest(tmp_path, family: str, stored: torch.dtype):
    base = save_tiny(tmp_path / "base", family, dtype=stored)
    digest = Checkpoint.open(base).digest()
    for dtype in ("float32", "bfloat16"):
        assert model_digest(load_model(str(base), dtype)) == digest


def test_a_digest_rounded_to_float16_is_that_of_the_model_loaded_in_it(tmp_path):
    model = tiny_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1e-4)  # where float16 has fewer bits than bfloat16
    model.save_pretrained(tmp_path)
    found = Checkpoint.open(tmp_path)
    assert found.digest(torch.float16) == model_digest(model, torch.float16) == model_digest(model.half())
    assert found.digest() != found.digest(torch.float16)


PARTS = """embed_tokens self_attn.q_proj self_attn.kv_b_proj mlp.gate.weight experts.gate_up_proj experts.down_proj
shared_experts.up_proj norm.weight lm_head""".split()


@pytest.mark.parametrize("part", PARTS)
def test_a_model_that_differs_in_any_part_has_another_digest(part: str):
    model = tiny_model()
    before = model_digest(model)
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if part in name).mul_(1.5)
    assert model_digest(model) != before


def spaced(length: int) -> set[int]:
    """64 places over a tensor, the first and the last among them, by whole numbers."""
    return {length - 1 if i == 63 else i * (length - 1) // 63 for i in range(64)}


# 9600 values: no other of the 64 places is a whole number, which rounding might turn into the one below.
@pytest.mark.parametrize("place", [0, 152, 304, 4875, 9446, 9447, 9598, 9599, 1, 63, 151, 153, 4800, 4874, 4876])
def test_64_evenly_spaced_values_of_a_tensor_make_the_digest(place: int):
    model = tiny_model()
    before = model_digest(model)
    assert model.lm_head.weight.numel() == 9600
    with torch.no_grad():
        model.lm_head.weight.view(-1)[place] += 1
    assert (model_digest(model) != before) == (place in spaced(9600))


@pytest.mark.parametrize("place", range(0, 32, 5))
def test_of_a_small_tensor_every_value_counts(place: int):
    model = tiny_model()
    before = model_digest(model)
    with torch.no_grad():
        model.model.norm.weight[place] += 1
    assert model_digest(model) != before


def test_the_digest_stays_what_earlier_adapters_say_of_their_base(tmp_path):
    """Of names, shapes and values that are exact in bfloat16, hashed in the order of the names."""
    base = save_tiny(tmp_path / "base", dtype=torch.bfloat16)
    expected = hashlib.sha256()
    for name, tensor in sorted(load_file(base / WEIGHTS).items()):
        length = tensor.numel()
        places = torch.linspace(0, length - 1, min(64, length), dtype=torch.float64).long()
        expected.update(f"{name} {tuple(tensor.shape)} ".encode())
        expected.update(tensor.flatten()[places].float().numpy().tobytes())
    assert Checkpoint.open(base).digest() == expected.hexdigest()


def rename_one(tensors: dict) -> None:
    """To a name that sorts into the same place, so that the values stay in their order."""
    tensors["model.layers.0.self_attn.renamed.weight"] = tensors.pop("model.layers.0.self_attn.q_proj.weight")


@pytest.mark.parametrize("change", [rename_one, lambda t: t.update({HEAD: t[HEAD].reshape(32, 300)})])
def test_names_and_shapes_are_in_the_digest(tmp_path, change):
    base = save_tiny(tmp_path / "base")
    before = Checkpoint.open(base).digest()
    rewrite(base, change)
    assert Checkpoint.open(base).digest() != before


def test_the_digest_is_the_same_however_the_tensors_lie_in_files(tmp_path):
    one = Checkpoint.open(save_tiny(tmp_path / "one"))
    many = Checkpoint.open(shards(tmp_path / "many"))
    assert one.digest() == many.digest()
    assert set(one.files.values()) == {WEIGHTS}
    assert one.files.keys() == many.files.keys()
    for name, file in many.files.items():
        assert name in load_file(many.folder / file)


def test_a_tied_weight_is_in_the_digest_once():
    model = tiny_model("qwen3_moe", tie_word_embeddings=True)
    alone = tiny_model("qwen3_moe", tie_word_embeddings=True)
    alone.state_dict = lambda: {n: t for n, t in model.state_dict().items() if n != HEAD}
    assert HEAD in model.state_dict()
    assert model_digest(model) == model_digest(alone)


def test_weights_that_are_elsewhere_have_no_digest():
    model = tiny_model()
    model.model.norm.to("meta")
    with pytest.raises(esft.InputError, match=r"^model\.norm\.weight: the weights are not in memory"):
        model_digest(model)


@pytest.mark.parametrize("family", ["olmoe", "granitemoe", "gpt_oss", "qwen3_vl_moe"])
def test_files_that_hold_the_models_own_tensors_are_told_apart_and_have_the_same_digest(tmp_path, family: str):
    model = multimodal.tiny() if family == "qwen3_vl_moe" else zoo.tiny(family)
    model.save_pretrained(tmp_path / "own", save_original_format=False)
    model.save_pretrained(tmp_path / "original")
    if family == "qwen3_vl_moe":  # the same names, transposed
        multimodal.as_on_the_hub(tmp_path / "original")
    own, original = Checkpoint.open(tmp_path / "own"), Checkpoint.open(tmp_path / "original")
    assert not original.as_in_memory
    assert own.as_in_memory == (family != "gpt_oss")  # whose two forms are one
    assert own.digest() == original.digest() == model_digest(model)


def test_extra_prediction_layers_do_not_count(tmp_path):
    base = save_tiny(tmp_path / "base")
    digest = Checkpoint.open(base).digest()
    tensors = load_file(base / "model.safetensors")
    extra = {name.replace("layers.2.", "layers.3."): t.clone() for name, t in tensors.items() if "layers.2." in name}
    save_file(tensors | extra, base / "model.safetensors", {"format": "pt"})
    assert extra
    assert Checkpoint.open(base).digest() == digest


def test_further_prediction_layers_are_no_weights_of_the_model_but_those_of_another_tower_are(tmp_path):
    base = Checkpoint.open(save_tiny(tmp_path / "base"))  # three layers
    names = {"model.layers.3.mlp.experts.0.up_proj.weight": "", "vision_tower.layers.7.attn.weight": ""}
    checkpoint = Checkpoint(base.folder, base.files | names, base.config)
    assert not checkpoint.belongs("model.layers.3.mlp.experts.0.up_proj.weight")
    assert not checkpoint.belongs("model.layers.3.embed.weight")
    assert not checkpoint.belongs("model.layers.10.embed.weight")
    assert checkpoint.belongs("model.layers.2.mlp.experts.0.up_proj.weight")
    assert checkpoint.belongs("vision_tower.layers.7.attn.weight")
    assert checkpoint.belongs("model.norm.weight")
    assert not checkpoint.belongs("model.rotary_emb.inv_freq")
    assert not checkpoint.belongs("model.layers.0.self_attn.rotary_emb.inv_freq")


def second_name(tensors: dict, held: str, head: str = HEAD) -> None:
    """Give a tied embedding's second name what it has in some files."""
    value = tensors[EMBEDDING].clone()
    tensors[head] = {"two values": value * 2, "two dtypes": value.bfloat16(), "two shapes": value[:-1]}.get(held, value)
    if held == "two dtypes":
        tensors[EMBEDDING] = value.bfloat16().float()
    if held == "second":
        del tensors[EMBEDDING]


@pytest.mark.parametrize(
    ("held", "tied", "names"),
    [
        ("first", True, [EMBEDDING]),
        ("second", True, [HEAD]),
        ("both", True, [EMBEDDING, HEAD]),
        ("two values", False, [EMBEDDING]),
        ("two dtypes", False, [EMBEDDING]),
        ("two shapes", False, [EMBEDDING]),
    ],
)
def test_tied_weights_are_one_unless_the_files_hold_two(tmp_path, held: str, tied: bool, names: list[str]):
    tiny_model("qwen3_moe", tie_word_embeddings=True).save_pretrained(tmp_path)
    once = Checkpoint.open(tmp_path).digest()
    if held != "first":
        rewrite(tmp_path, lambda tensors: second_name(tensors, held))
    found = Checkpoint.open(tmp_path)
    assert found.tied == ({HEAD: EMBEDDING} if tied else {})
    assert found.names_of(EMBEDDING) == names
    assert found.names_of(HEAD) == ([HEAD] if HEAD in found.files else [])
    assert found.names_of("model.norm.weight") == ["model.norm.weight"]
    assert found.names_of("nothing") == []
    assert (found.digest() == once) == tied


@pytest.mark.parametrize(("original", "head"), [(True, "head.weight"), (False, HEAD)])
def test_tied_weights_have_the_names_of_the_files(tmp_path, original: bool, head: str):
    """The original format of this family has another name for the head."""
    zoo.tiny("deepseek_v4", tie_word_embeddings=True).save_pretrained(tmp_path, save_original_format=original)
    assert Checkpoint.open(tmp_path).tied == {head: EMBEDDING}
    rewrite(tmp_path, lambda tensors: second_name(tensors, "both", head))
    found = Checkpoint.open(tmp_path)
    assert found.as_in_memory != original
    assert found.tied == {head: EMBEDDING}


def test_tied_weights_are_compared_over_two_files(tmp_path):
    tiny_model("qwen3_moe", tie_word_embeddings=True).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    (tmp_path / WEIGHTS).unlink()
    save_file(tensors, tmp_path / "one.safetensors")
    files = dict.fromkeys(tensors, "one.safetensors") | {HEAD: "two.safetensors"}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": files}))
    for factor in (1, 2):
        save_file({HEAD: tensors[EMBEDDING] * factor}, tmp_path / "two.safetensors")
        assert Checkpoint.open(tmp_path).tied == ({HEAD: EMBEDDING} if factor == 1 else {})


def test_where_a_tensor_lies_is_found_in_its_own_file_and_a_wrong_index_is_named(tmp_path):
    base = shards(tmp_path / "base")
    found = Checkpoint.open(base)
    for name in (HEAD, "model.layers.1.mlp.experts.3.up_proj.weight"):
        stored, tensor = found.stored(name), load_file(base / found.files[name])[name]
        content = (base / found.files[name]).read_bytes()[stored.start : stored.end]
        assert (stored.dtype, stored.shape) == ("F32", tuple(tensor.shape))
        assert content == tensor.numpy().tobytes()
    other = next(file for file in found.files.values() if file != found.files[HEAD])
    rewrite_json(base / INDEX, lambda index: index["weight_map"].update({HEAD: other}))
    with pytest.raises(esft.InputError, match=rf"base/{other}: holds no tensor {HEAD}, as the index says"):
        Checkpoint.open(base).stored(HEAD)


def test_the_dtype_is_the_configurations_of_the_text_model(tmp_path):
    assert Checkpoint.open(save_tiny(tmp_path / "a", dtype=torch.bfloat16)).dtype == torch.bfloat16
    found = Checkpoint.open(save_tiny(tmp_path / "b"))
    assert found.dtype == torch.float32
    for value, dtype in (("float16", torch.float16), (torch.bfloat16, torch.bfloat16), (None, None)):
        vars(found.config)["dtype"] = value
        assert found.dtype is dtype
    model = multimodal.tiny()
    model.config.text_config.dtype, model.config.dtype = torch.bfloat16, torch.float32
    assert Checkpoint(tmp_path, {}, model.config).dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("architectures", "wanted"),
    [
        (["DeepseekV2ForSequenceClassification"], "DeepseekV2ForSequenceClassification"),
        (["DeepseekV2ForCausalLM", "DeepseekV2Model"], "DeepseekV2ForCausalLM"),
        (["OfAnotherLibrary"], "DeepseekV2ForCausalLM"),
        (["DeepseekV2Config"], "DeepseekV2ForCausalLM"),  # a class, but no model
        (["pipeline"], "DeepseekV2ForCausalLM"),  # no class at all
        ([], "DeepseekV2ForCausalLM"),
        (None, "DeepseekV2ForCausalLM"),
    ],
)
def test_the_skeleton_is_of_the_class_that_the_configuration_names(tmp_path, architectures, wanted: str):
    base = save_tiny(tmp_path / "base")
    rewrite_json(base / "config.json", lambda config: config.update(architectures=architectures))
    skeleton = Checkpoint.open(base).skeleton
    assert type(skeleton).__name__ == wanted
    assert all(parameter.is_meta for parameter in skeleton.parameters())


@pytest.mark.parametrize(
    ("key", "value"), [("hidden_act", "foo"), ("num_hidden_layers", "x"), ("architectures", ["BertModel"])]
)
def test_a_configuration_that_makes_no_model_is_named(tmp_path, key, value):
    tiny_model().save_pretrained(tmp_path)
    rewrite_json(tmp_path / "config.json", lambda config: config.update({key: value}))
    with pytest.raises(esft.InputError, match=r"config\.json: (makes no model|not a model's configuration) \(."):
        _ = Checkpoint.open(tmp_path).skeleton


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


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("one\ntwo"), "one"),
        (ValueError("\n  one  \ntwo"), "one  "),
        (ValueError(" \n"), "ValueError"),
        (KeyError(), "KeyError"),
    ],
)
def test_an_error_is_said_by_its_first_line_or_its_kind(error: Exception, line: str):
    assert first_line(error) == line


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("config.json", "{", "not a model's configuration"),
        ("config.json", '{"model_type": "unheard_of"}', "not a model's configuration"),
        (INDEX, "{}", r"index\.json: has no weight_map"),
        (INDEX, "[]", r"index\.json: has no weight_map"),
        (INDEX, '{"weight_map": ["model.safetensors"]}', r"index\.json: has no weight_map"),
        (WEIGHTS, "nonsense", r"model\.safetensors: not a readable safetensors file"),
    ],
)
def test_a_damaged_folder_is_refused(tmp_path, file: str, text: str, message: str):
    base = save_tiny(tmp_path / "base")
    (base / file).write_text(text)
    with pytest.raises(esft.InputError, match=message):
        Checkpoint.open(base)


@pytest.mark.parametrize(
    "name",
    ["../elsewhere/model.safetensors", "sub/model.safetensors", "", 7, None, "..", "pytorch_model.bin", "safetensors"],
)
def test_an_index_that_names_no_file_of_its_folder_is_refused(tmp_path, name):
    base = shards(tmp_path / "base")
    rewrite_json(base / INDEX, lambda index: index["weight_map"].update({HEAD: name}))
    with pytest.raises(esft.InputError, match=rf"index\.json: {name!r} is not the name of a safetensors file"):
        Checkpoint.open(base)


def test_a_folder_without_a_config_or_without_weights_is_refused(tmp_path):
    base = save_tiny(tmp_path / "base")
    assert Checkpoint.open(str(base)).folder == base
    (base / WEIGHTS).rename(base / "pytorch_model.bin")
    with pytest.raises(esft.InputError, match=rf"base: no {WEIGHTS} and no {INDEX} \(pickled weights are never"):
        Checkpoint.open(base)
    (base / WEIGHTS).mkdir()
    with pytest.raises(esft.InputError, match="pickled weights are never"):
        Checkpoint.open(base)
    (base / "config.json").rename(base / "other.json")
    (base / "config.json").mkdir()
    with pytest.raises(esft.InputError, match=r"base: not a checkpoint folder \(no config\.json\)"):
        Checkpoint.open(base)


def test_a_base_with_two_sets_of_weights_is_refused_and_an_index_of_the_one_file_is_not(tmp_path):
    base, other = tmp_path / "base", shards(tmp_path / "shards")
    tiny_model().save_pretrained(base)
    shutil.copyfile(other / INDEX, base / INDEX)
    with pytest.raises(esft.InputError, match=r"base: holds model\.safetensors and an index of other files"):
        Checkpoint.open(base)
    rewrite_json(base / INDEX, lambda index: index["weight_map"].update(dict.fromkeys(index["weight_map"], WEIGHTS)))
    assert Checkpoint.open(base).digest() == Checkpoint.open(other).digest()


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

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import esft
from esft.checkpoint import folder
from esft.checkpoint.digest import model_digest
from esft.checkpoint.folder import Checkpoint
from tests.esft import test_multimodal as multimodal
from tests.esft import zoo
from tests.esft.checkpoint.files import WEIGHTS, rewrite, rewrite_json
from tests.esft.models import save_tiny, tiny_model

INDEX = "model.safetensors.index.json"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def shards(folder: Path) -> Path:
    tiny_model().save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


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
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))
    for factor in (1, 2):
        save_file({HEAD: tensors[EMBEDDING] * factor}, tmp_path / "two.safetensors")
        assert Checkpoint.open(tmp_path).tied == ({HEAD: EMBEDDING} if factor == 1 else {})


def test_where_a_tensor_lies_is_found_in_its_own_file_and_a_wrong_index_is_named(tmp_path):
    base = shards(tmp_path / "base")
    found = Checkpoint.open(base)
    for name in (HEAD, "model.layers.1.mlp.experts.3.up_proj.weight"):
        stored, tensor = found.info(name), load_file(base / found.files[name])[name]
        content = (base / found.files[name]).read_bytes()[stored.start : stored.end]
        assert (stored.dtype, stored.shape) == ("F32", tuple(tensor.shape))
        assert content == tensor.numpy().tobytes()
    other = next(file for file in found.files.values() if file != found.files[HEAD])
    rewrite_json(base / INDEX, lambda index: index["weight_map"].update({HEAD: other}))
    with pytest.raises(esft.InputError, match=rf"base/{other}: holds no tensor {HEAD}, as the index says"):
        Checkpoint.open(base).info(HEAD)


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
        (["DeepseekV2Model"], "DeepseekV2ForCausalLM"),  # which is what loading makes of it
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
    ("key", "value"),
    [("hidden_act", "foo"), ("num_hidden_layers", "x")],
)
def test_a_configuration_that_makes_no_model_is_named(tmp_path, key, value):
    tiny_model().save_pretrained(tmp_path)
    rewrite_json(tmp_path / "config.json", lambda config: config.update({key: value}))
    with pytest.raises(esft.InputError, match=r"config\.json: (makes no model|not a model's configuration) \(."):
        _ = Checkpoint.open(tmp_path).skeleton


@pytest.mark.parametrize("original", [True, False])
def test_the_tensor_that_does_not_fit_the_model_is_found(tmp_path, original: bool):
    tiny_model().save_pretrained(tmp_path, save_original_format=original)
    assert Checkpoint.open(tmp_path).misfit() is None
    name = "model.norm.weight"
    rewrite(tmp_path, lambda tensors: tensors.update({name: torch.ones(7)}))
    said = rf"tensor {name} has shape (7,), and the configuration's model has (32,)"
    assert Checkpoint.open(tmp_path).misfit() == said
    rewrite(tmp_path, lambda tensors: tensors.pop(name))
    assert Checkpoint.open(tmp_path).misfit() == f"tensor {name} is missing"


def test_a_tied_head_need_not_be_there_to_fit(tmp_path):
    tiny_model("qwen3_moe", tie_word_embeddings=True).save_pretrained(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    assert HEAD not in checkpoint.files and checkpoint.misfit() is None


def test_a_folder_that_is_not_there_is_no_hub_id(tmp_path):
    with pytest.raises(esft.InputError, match="^absent: no such folder$"):
        Checkpoint.open("absent")


@pytest.mark.parametrize("original", [True, False])
def test_the_digest_is_the_models_whichever_way_the_files_hold_its_tensors(tmp_path, original: bool):
    model = tiny_model()
    model.save_pretrained(tmp_path, save_original_format=original)
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.as_in_memory is not original and checkpoint.digest() == model_digest(model)


@pytest.mark.parametrize("trusted", [True, False])
def test_a_models_own_code_is_run_only_where_it_is_trusted(tmp_path, monkeypatch, trusted: bool):
    save_tiny(tmp_path)
    rewrite_json(tmp_path / "config.json", lambda config: config.update(architectures=["OfItsOwnCode"]))
    asked = {}
    monkeypatch.setattr(folder.AutoModelForCausalLM, "from_config", lambda config, **more: asked.update(more))
    Checkpoint.open(tmp_path, trusted).skeleton  # noqa: B018
    assert asked == {"trust_remote_code": trusted}


def test_further_prediction_layers_and_what_is_computed_are_no_weights_of_the_model(tmp_path):
    save_tiny(tmp_path)  # of three layers, 0 to 2
    rewrite(tmp_path, lambda tensors: tensors.update({"model.layers.3.norm.weight": torch.ones(1)}))
    checkpoint = Checkpoint.open(tmp_path)
    for name, belongs in (
        ("model.layers.2.norm.weight", True),
        ("model.layers.3.norm.weight", False),
        ("model.layers.12.norm.weight", False),
        ("vision.layers.12.norm.weight", True),  # a tower with layers of its own
        ("model.rotary_emb.inv_freq", False),
        ("model.layers.0.rotary_emb.inv_freq", False),
    ):
        assert checkpoint.belongs(name) is belongs, name


@pytest.mark.parametrize("original", [True, False])
def test_files_of_a_model_without_its_head_have_the_names_of_the_one_with_it(tmp_path, original: bool):
    model = tiny_model("qwen3_moe", tie_word_embeddings=True)
    model.base_model.save_pretrained(tmp_path, save_original_format=original, max_shard_size="100KB")
    checkpoint = Checkpoint.open(tmp_path)
    assert "embed_tokens.weight" in checkpoint.stored and EMBEDDING in checkpoint.files
    assert checkpoint.as_in_memory is not original and checkpoint.misfit() is None
    assert checkpoint.digest() == model_digest(model) and checkpoint.names_of(HEAD) == []
    assert checkpoint.info(EMBEDDING).shape == (300, 32)


def test_files_of_a_model_without_a_head_that_it_needs_lack_it(tmp_path):
    tiny_model().base_model.save_pretrained(tmp_path)
    assert Checkpoint.open(tmp_path).misfit() == f"tensor {HEAD} is missing"

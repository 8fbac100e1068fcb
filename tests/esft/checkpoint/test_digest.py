import hashlib
import json
from pathlib import Path

import pytest
import torch
import xxhash
from safetensors.torch import load_file, save_file

import esft
from esft.checkpoint.digest import (
    base_below,
    digest_of,
    forward_settings,
    model_base,
    model_digest,
    sampled_digest,
)
from esft.checkpoint.folder import Checkpoint
from esft.checkpoint.load import load_model
from esft.experts.model_state import Adapters, Base, model_state
from esft.selection import ExpertSelection
from tests.esft import test_multimodal as multimodal
from tests.esft import zoo
from tests.esft.checkpoint.files import WEIGHTS, rewrite
from tests.esft.models import FAMILIES, save_tiny, tiny_model

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


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
def test_every_value_makes_the_digest_and_64_evenly_spaced_ones_its_first_part(place: int, monkeypatch):
    monkeypatch.setattr("esft.checkpoint.digest.CHUNK", 1000)  # so that a tensor is read in several pieces
    model = tiny_model()
    sampled, whole = model_digest(model).split("-")
    assert model.lm_head.weight.numel() == 9600
    with torch.no_grad():
        model.lm_head.weight.view(-1)[place] += 1
    after = model_digest(model).split("-")
    assert (after[0] != sampled) == (place in spaced(9600))
    assert after[1] != whole


def test_in_how_many_pieces_a_tensor_is_read_does_not_matter(monkeypatch):
    before = model_digest(tiny_model())
    monkeypatch.setattr("esft.checkpoint.digest.CHUNK", 7)
    assert model_digest(tiny_model()) == before


@pytest.mark.parametrize(("old", "new"), [(300, 301), (2**40, 2**40 + 1), (0, 1)])
def test_whole_numbers_are_not_rounded(old: int, new: int):
    one, other = ({"a": torch.full((200,), 5), "b": torch.tensor([1, n, 1])} for n in (old, new))
    assert digest_of(one.items()).partition("-")[2] != digest_of(other.items()).partition("-")[2]
    assert digest_of(one.items()) == digest_of(reversed(one.items()))


def test_what_the_forward_pass_depends_on_is_told_from_the_rest():
    config = tiny_model().config
    settings = forward_settings(config)
    assert {"num_experts_per_tok", "hidden_act", "rope_parameters", "rms_norm_eps"} <= settings.keys()
    config.use_cache, config.pad_token_id, config.dtype = False, 3, "float16"
    config._attn_implementation = "eager"
    assert forward_settings(config) == settings == json.loads(json.dumps(settings))
    config.num_experts_per_tok += 1
    assert forward_settings(config) == settings | {"num_experts_per_tok": config.num_experts_per_tok}


@pytest.mark.parametrize("place", range(0, 32, 5))
def test_of_a_small_tensor_every_value_counts(place: int):
    model = tiny_model()
    before = model_digest(model)
    with torch.no_grad():
        model.model.norm.weight[place] += 1
    assert model_digest(model) != before


def test_the_digest_stays_what_earlier_adapters_say_of_their_base(tmp_path):
    """Names, shapes and values that are exact in bfloat16, some of them and all, hashed in the order of the names."""
    base = save_tiny(tmp_path / "base", dtype=torch.bfloat16)
    expected, every = hashlib.sha256(), xxhash.xxh3_128()
    for name, tensor in sorted(load_file(base / WEIGHTS).items()):
        length = tensor.numel()
        places = torch.linspace(0, length - 1, min(64, length), dtype=torch.float64).long()
        expected.update(f"{name} {tuple(tensor.shape)} ".encode())
        expected.update(tensor.flatten()[places].float().numpy().tobytes())
        bits = tensor.view(torch.int16).numpy().tobytes()
        every.update(f"{name} {tuple(tensor.shape)} ".encode() + xxhash.xxh3_128(bits).digest())
    assert Checkpoint.open(base).digest() == f"{expected.hexdigest()}-{every.hexdigest()}"


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


def test_a_setting_that_has_no_end_is_told_by_its_name():
    settings = forward_settings(zoo.tiny("nemotron_h").config)
    assert "Infinity" in settings["time_step_limit"]
    json.dumps(settings, allow_nan=False)


def test_the_base_is_what_lies_below_an_adapter_that_is_set_and_the_model_itself_where_none_is():
    model, below = tiny_model(), Base("b", "0", torch.float32, {})
    assert base_below(model) == model_base(model)
    model_state(model).adapters = adapters = Adapters(below)
    assert base_below(model) == model_base(model)
    adapters.active = "default"
    assert base_below(model) is below
    adapters.active = None
    swapped = esft.swap(tiny_model(), ExpertSelection({1: [0]}))
    before = base_below(swapped)
    assert before.digest == model_digest(tiny_model())
    model_state(swapped).adapters = adapters
    assert base_below(swapped) is below


def test_a_digest_of_samples_is_that_of_the_weights_in_memory_and_of_each_of_them():
    model, expected = tiny_model(), sampled_digest(tiny_model())
    assert sampled_digest(model) == expected
    seen = {expected, sampled_digest(tiny_model(seed=1)), sampled_digest(tiny_model(dtype=torch.bfloat16))}
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.view(-1)[-1] += 1.0
        seen.add(sampled_digest(model))
    assert len(seen) == 3 + len([*model.parameters()])
    model.lm_head.to("meta")  # of what is offloaded nothing is known
    assert sampled_digest(model) not in seen


def test_the_base_of_a_stock_model_is_rounded_as_asked():
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e-6)  # where float16 has fewer bits than bfloat16
    assert base_below(model, torch.float16) == model_base(model, torch.float16) != base_below(model)


def test_neither_another_tower_nor_the_place_of_the_files_is_of_the_forward_pass():
    config = multimodal.tiny().config
    settings = forward_settings(config)
    assert settings == forward_settings(config.get_text_config()) and "vision_config" not in settings
    config.get_text_config().name_or_path = "moved/elsewhere"
    assert forward_settings(config) == settings


def test_a_digest_of_samples_is_of_the_weights_names_too():
    weight = torch.nn.Parameter(torch.ones(3))
    assert len({sampled_digest(torch.nn.ParameterDict({name: weight})) for name in ("a", "b")}) == 2

"""Names and layouts of the original format, whatever files a model came from."""

import importlib

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel

import esft
from esft.checkpoint.original_format import by_layer, original_format
from esft.selection import ExpertSelection
from tests.esft import test_multimodal as multimodal
from tests.esft import zoo

# Families whose files are the model's tensors under other names, taken apart, or neither, and some of one layer each.
NAMES = {
    "mixtral": ["model.layers.0.block_sparse_moe.experts.7.w1.weight", "model.layers.1.block_sparse_moe.gate.weight"],
    "granitemoe": ["model.layers.1.block_sparse_moe.input_linear.weight"],
    "nemotron_h": ["backbone.layers.1.mixer.experts.0.up_proj.weight", "backbone.embeddings.weight"],
    "kimi_linear": ["model.layers.0.self_attn.q_conv1d.weight", "model.layers.0.self_attn.v_conv1d.weight"],
    "gpt_oss": ["model.layers.0.mlp.experts.gate_up_proj"],
    # Whose own names set off a renaming too, so that files that hold the model's tensors are not told by its absence.
    "laguna": ["model.layers.0.mlp.shared_expert.up_proj.weight", "model.layers.1.mlp.experts.7.down_proj.weight"],
    "axk1": ["model.layers.1.post_mlp_layernorm.weight", "model.layers.1.mlp.experts.0.gate_proj.weight"],
}


def to_stored(model, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return dict(original_format(model)(tensors, tensors.__getitem__))


@pytest.mark.parametrize("form", ["original", "own", "never saved"])
@pytest.mark.parametrize("family", NAMES)
def test_names_and_values_are_the_original_formats_whatever_the_files_were(family: str, form: str, tmp_path):
    model = zoo.tiny(family)
    model.save_pretrained(tmp_path / "original")
    expected = load_file(tmp_path / "original" / "model.safetensors")
    assert expected.keys() >= set(NAMES[family])
    if form != "never saved":
        model.save_pretrained(tmp_path / form, save_original_format=form == "original")
        model = zoo.model_class(family).from_pretrained(tmp_path / form)
    found = to_stored(model, model.state_dict())
    if model.config.tie_word_embeddings:
        found.pop("lm_head.weight", None)
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


@pytest.mark.parametrize("swapped", [False, True])
def test_gates_and_ups_of_each_expert_come_apart(swapped: bool):
    model = zoo.tiny("mixtral")
    if swapped:  # which has no parameters of these names
        esft.swap(model, ExpertSelection({}))
    gate_up = torch.randn(8, 48, 32)
    stored = to_stored(model, {"model.layers.1.mlp.experts.gate_up_proj": gate_up})
    experts = "model.layers.1.block_sparse_moe.experts"
    assert stored.keys() == {f"{experts}.{e}.{name}.weight" for e in range(8) for name in ("w1", "w3")}
    for e in range(8):
        assert torch.equal(stored[f"{experts}.{e}.w1.weight"], gate_up[e, :24])
        assert torch.equal(stored[f"{experts}.{e}.w3.weight"], gate_up[e, 24:])


def test_tensors_are_transposed_to_the_hubs_form_of_which_only_the_shape_tells():
    model = multimodal.tiny()
    name = "model.language_model.layers.0.mlp.experts.gate_up_proj"
    tensor = model.get_parameter(name).detach()
    assert torch.equal(to_stored(model, {name: tensor})[name], tensor.mT)


@pytest.mark.parametrize("prefix", ["model.", "model.language_model."])
def test_a_prefix_that_the_files_have_is_kept_and_none_is_made_up(prefix: str, tmp_path):
    zoo.tiny("qwen3_5_moe").save_pretrained(tmp_path)
    own = load_file(tmp_path / "model.safetensors")
    renamed = {prefix + n.removeprefix("model.") if n.startswith("model.") else n: t for n, t in own.items()}
    save_file(renamed, tmp_path / "model.safetensors", {"format": "pt"})
    model = zoo.model_class("qwen3_5_moe").from_pretrained(tmp_path)
    name = "model.layers.1.mlp.gate.weight"
    stored = to_stored(model, {name: model.state_dict()[name]})
    assert stored.keys() == {f"{prefix}layers.1.mlp.gate.weight"}
    assert to_stored(zoo.tiny("qwen3_5_moe"), {name: torch.ones(8, 32)}).keys() == {name}


def test_nothing_is_stored_by_the_legacy_names_that_transformers_can_still_read():
    config = {"vocab_size": 8, "hidden_size": 8, "num_hidden_layers": 1, "intermediate_size": 8}
    model = BertModel(BertConfig(**config, num_attention_heads=1))
    assert to_stored(model, model.state_dict()).keys() == model.state_dict().keys()


def test_conversions_are_found_once_and_kept_on_the_model(monkeypatch):
    model, asked = zoo.tiny("mixtral"), []
    module = importlib.import_module("esft.transformers_internals")
    find = module.get_model_conversion_mapping
    monkeypatch.setattr(module, "get_model_conversion_mapping", lambda *a, **k: asked.append(a) or find(*a, **k))
    name = "model.layers.1.mlp.gate.weight"
    first = to_stored(model, {name: torch.ones(8, 32)})
    times = len(asked)
    assert times > 0
    assert to_stored(model, {name: torch.ones(8, 32)}).keys() == first.keys()
    assert len(asked) == times
    to_stored(zoo.tiny("mixtral"), {name: torch.ones(8, 32)})
    assert len(asked) == 2 * times


def test_names_are_grouped_by_the_first_number_between_dots():
    names = [
        "model.layers.1.mlp.experts.0.w",
        "model.embed.weight",
        "layers.1.w",
        "model.layers.10.w",
        "model.layers.1.mlp.experts.12.w",
        "norm.2",
        "conv.1d.weight",
        "vision.layers.1.w",
    ]
    assert list(by_layer(names)) == [
        ["model.layers.1.mlp.experts.0.w", "model.layers.1.mlp.experts.12.w"],
        ["model.embed.weight", "norm.2", "conv.1d.weight"],
        ["layers.1.w"],
        ["model.layers.10.w"],
        ["vision.layers.1.w"],
    ]


def test_no_more_than_one_layer_is_read_before_it_is_asked_for():
    model, read = zoo.tiny("mixtral"), []
    names = [f"model.layers.{layer}.mlp.{name}" for name in ("gate.weight", "experts.down_proj") for layer in (0, 1)]

    def tensor(name: str) -> torch.Tensor:
        read.append(name)
        return model.state_dict()[name]

    stored = original_format(model)(names, tensor)
    assert read == []
    first = [next(stored) for _ in range(9)]  # a router and eight experts
    assert read == [names[0], names[2]]
    assert all(name.startswith("model.layers.0.block_sparse_moe.") for name, _ in first)
    assert len(list(stored)) == 9
    assert read == [names[0], names[2], names[1], names[3]]

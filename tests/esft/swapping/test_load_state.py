"""What is saved of a swapped model is the stock model's checkpoint, and a swapped model reads it back."""

import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import esft
from esft.checkpoint.original_format import original_format
from esft.checkpoint.tensor_names import expert_tensors
from esft.checkpoint.views import Part
from esft.experts.moe_layers import moe_layers, stock_weights
from esft.selection import ExpertSelection
from esft.swapping.load_state import whole_pools
from esft.swapping.save_pretrained import stock_state
from tests.esft import test_multimodal as multimodal
from tests.esft import zoo
from tests.esft.experts import test_moe_layers as families
from tests.esft.models import tiny_model, token_batch
from tests.esft.swapping.models import swapped


def test_a_stock_models_state_loads_into_a_swapped_one():
    stock, model = tiny_model(seed=1), swapped()
    expected = stock(**token_batch()).logits
    model.load_state_dict(stock.state_dict())
    torch.testing.assert_close(model(**token_batch()).logits, expected, atol=2e-6, rtol=1e-5)


def test_a_checkpoint_that_does_not_fit_is_an_error_or_its_gaps_are_reported(tmp_path):
    model = swapped(tuned=True)
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.experts.5.up_proj.weight"
    with pytest.raises(esft.InputError, match=rf"{name}: has shape \(3, 32\), the model's has \(20, 32\)"):
        swapped().load_state_dict(state | {name: state[name][:3]})
    with pytest.raises(RuntimeError, match="Missing key.*layers.1.mlp.experts.trained_gate_up_proj"):
        swapped().load_state_dict({n: t for n, t in state.items() if n != name})
    with pytest.raises(RuntimeError, match='Unexpected key.*"other"'):
        swapped().load_state_dict(state | {"other": torch.ones(1)})


def test_a_checkpoint_loads_into_a_model_inside_another_under_its_prefix():
    stock, model = tiny_model(seed=1), swapped()
    outer = torch.nn.ModuleDict({"inner": model})
    state = {f"inner.{name}": tensor for name, tensor in stock.state_dict().items()}
    outer.load_state_dict(dict(state))
    assert all(
        torch.equal(tensor, stock.state_dict()[name]) for name, tensor in stock_state(model, model.state_dict()).items()
    )
    with pytest.raises(RuntimeError, match='Unexpected key.*"inner.other"'):
        outer.load_state_dict(state | {"inner.other": torch.ones(1)})
    own = {f"inner.{name}": tensor + 1 for name, tensor in model.state_dict().items()}
    outer.load_state_dict(dict(own))
    assert all(torch.equal(tensor, own[f"inner.{name}"]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("family", "name", "wrong", "right"),
    [
        ("granitemoe", "model.layers.0.block_sparse_moe.input_linear.weight", (7, 48, 32), (8, 48, 32)),
        ("gpt_oss", "model.layers.0.mlp.experts.down_proj_bias", (8, 31), (8, 32)),
        ("kimi_linear", "model.layers.0.self_attn.k_conv1d.weight", (32, 4), (32, 1, 4)),
    ],
)
def test_a_tensor_of_another_shape_is_refused_with_both_shapes(family: str, name: str, wrong, right):
    model = families.swapped(zoo.tiny(family), ExpertSelection({}))
    own = zoo.tiny(family).state_dict()
    state = dict(original_format(zoo.tiny(family))(own, own.__getitem__))
    assert tuple(state[name].shape) == right
    shapes = rf"has shape {wrong}, the model's has {right}"
    with pytest.raises(esft.InputError, match=re.escape(f"{name}: {shapes}")):
        model.load_state_dict(state | {name: torch.zeros(wrong)})


@pytest.mark.parametrize("transposed", [False, True])
def test_of_files_in_two_forms_the_shape_tells_which_and_a_part_of_them_may_come(transposed: bool):
    stock, model = multimodal.tiny(), esft.swap(multimodal.tiny(), ExpertSelection({0: [3]}))
    names = [f"model.language_model.layers.{layer}.mlp.experts.down_proj" for layer in (0, 1)]
    value = torch.randn(8, 32, 12)
    found = model.load_state_dict({names[0]: value.mT if transposed else value}, strict=False)
    assert not found.unexpected_keys
    pools = [n for n in model.state_dict() if ".layers.0.mlp.experts." in n]
    assert set(pools) <= set(found.missing_keys)  # as the layer's other projection did not come
    state = stock_state(model, model.state_dict())
    assert torch.equal(state[names[0]], value)
    assert torch.equal(state[names[1]], stock.state_dict()[names[1]])


def test_where_both_forms_have_one_shape_the_checkpoints_own_is_read():
    # Of a family whose files would hold the halves' rows in turn, under the name that the model has.
    model = families.swapped(zoo.tiny("gpt_oss"), ExpertSelection({0: [3]}))
    for tensors in expert_tensors(model, stock_weights(model).experts, original_format(model)).values():
        for name, tensor in tensors.items():
            if tensor.name.endswith("gate_up_proj"):
                tensors[name] = replace(tensor, links=(replace(tensor.links[0], inside=Part("in turn")),))
    name = "model.layers.0.mlp.experts.gate_up_proj"
    value = torch.randn(8, 32, 48)
    model.load_state_dict({name: value}, strict=False)
    rows = [*range(0, 32, 2), *range(1, 32, 2)]
    assert torch.equal(stock_state(model, model.state_dict())[name], value[:, rows])


def test_experts_in_few_bits_or_elsewhere_read_no_checkpoint():
    model = esft.swap(tiny_model(), ExpertSelection({1: [0]}), frozen="int8")
    with pytest.raises(esft.InputError, match="the frozen experts are in int8; load it with esft.load$"):
        model.load_state_dict(tiny_model().state_dict())
    layer = moe_layers(swapped())[0]
    trained, frozen = pools = (layer.experts.trained_down_proj, layer.experts.frozen_down_proj)
    assert whole_pools(layer, pools, "load it first") == list(pools)
    for held in ((trained, None), (trained[:1], frozen), (trained, frozen[:0])):
        with pytest.raises(esft.InputError, match=r"experts: a part .* is elsewhere .*; load it first$"):
            whole_pools(layer, held, "load it first")


def test_a_swapped_models_own_state_is_not_mixed_with_a_checkpoints_names():
    model = swapped()
    name = "model.layers.1.mlp.experts.5.up_proj.weight"
    with pytest.raises(RuntimeError, match=f'Unexpected key.*"{name}"'):
        model.load_state_dict(model.state_dict() | {name: torch.zeros(20, 32)})


def test_parts_are_read_into_a_parameter_that_does_not_lie_in_order():
    model = families.swapped(zoo.tiny("kimi_linear"), ExpertSelection({}))
    name = "model.layers.0.self_attn.conv1d.weight"
    convolution = model.get_submodule(name.rpartition(".")[0])
    convolution.weight = torch.nn.Parameter(torch.zeros(4, 1, 96).permute(2, 1, 0), requires_grad=False)
    expected = zoo.tiny("kimi_linear").state_dict()[name]
    parts = dict(original_format(zoo.tiny("kimi_linear"))([name], lambda _: expected))
    assert len(parts) == 3
    model.load_state_dict(parts, strict=False)
    assert torch.equal(convolution.weight, expected)


def test_a_parameter_that_comes_under_both_its_names_is_read_by_the_models_own():
    model = families.swapped(zoo.tiny("granitemoe"), ExpertSelection({}))
    own, stored = (f"model.layers.0.block_sparse_moe.router.{name}" for name in ("weight", "layer.weight"))
    found = model.load_state_dict({own: torch.ones(8, 32), stored: torch.zeros(8, 32)}, strict=False)
    assert found.unexpected_keys == [stored]
    assert torch.equal(model.get_parameter(own), torch.ones(8, 32))


@pytest.mark.parametrize("family", ["deepseek_v2", "qwen2_moe"])
def test_a_checkpoint_does_not_load_into_linear_layers_in_few_bits(family: str):
    stock, model = tiny_model(family), esft.swap(tiny_model(family), ExpertSelection({1: [0]}), frozen_linear="nf4")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(
        esft.InputError, match=r"^model\.\S+\.weight: the frozen linear layers are in nf4; load it with esft"
    ):
        model.load_state_dict({name: tensor + 1 for name, tensor in stock.state_dict().items()})
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    model.load_state_dict({name: tensor + 1 for name, tensor in before.items()})
    model.model.embed_tokens.rows = 10**12  # the layers are only named: of their sizes no memory is taken
    outer = torch.nn.ModuleDict({"inner": model})
    with pytest.raises(esft.InputError, match=r"^model\.embed_tokens\.weight: the frozen linear layers are in nf4"):
        outer.load_state_dict({"inner.model.embed_tokens.weight": stock.model.embed_tokens.weight}, strict=False)

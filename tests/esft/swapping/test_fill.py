from contextlib import nullcontext

import pytest
import torch

import esft
from esft.checkpoint.folder import Checkpoint
from esft.checkpoint.load import load_model
from esft.checkpoint.packed_tensors import PackedTensor
from esft.experts.moe_layers import moe_layers
from esft.experts.pooled_experts import Experts
from esft.selection import ExpertSelection
from esft.swapping.fill import Filling, expert_places
from tests.esft.checkpoint.packed import fp8_checkpoint, mxfp4_checkpoint
from tests.esft.experts.test_stock_layout import listed
from tests.esft.models import save_tiny, tiny_model
from tests.esft.parallel.jobs import FirstOfTwo

UP = "model.layers.2.mlp.experts.7.up_proj.weight"


ORDERS = {
    "as in the files": lambda tensors: tensors,
    "backwards": lambda tensors: tensors[::-1],
    # All gates of a layer before all its ups: parts of many experts are on their way at once.
    "by projection": lambda tensors: sorted(tensors, key=lambda named: named[0].split(".")[-2:]),
}


def swapped(model, frozen: str):
    return esft.swap(model, ExpertSelection({1: [5, 2]}), frozen=frozen)


def blank(frozen: str, model=None):
    """A swapped model whose tensors are zeros, and the places of its experts."""
    model = model or tiny_model()
    places = expert_places(model)
    swapped(model, frozen)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    return model, places


def test_every_expert_has_its_places_by_the_names_of_the_files():
    places = expert_places(tiny_model())
    assert len(places) == 2 * 8 * 3
    ((layer, expert, stored),) = places[UP]
    assert (layer, expert, stored.name) == (2, 7, UP)
    assert expert_places(listed(tiny_model())) == {}


@pytest.mark.parametrize("frozen", ["bf16", "nf4"])
@pytest.mark.parametrize("order", ORDERS)
def test_tensors_may_come_in_any_order_and_are_handed_on(frozen: str, order: str, tmp_path):
    base = save_tiny(tmp_path / "base")
    model, places = blank(frozen)
    tensors = list(Checkpoint.open(base).tensors())
    given = ORDERS[order](tensors)
    filling = Filling(model, places, "base")
    handed_on = list(filling.through(given))
    assert filling._buffers == {}  # of what is packed, nothing plain is held any more
    assert all(a[0] == b[0] and a[1] is b[1] for a, b in zip(handed_on, given, strict=True))
    for layer, wanted in zip(moe_layers(model), moe_layers(swapped(tiny_model(), frozen)), strict=True):
        assert all(
            torch.equal(tensor, wanted.experts.state_dict()[n]) for n, tensor in layer.experts.state_dict().items()
        )


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("frozen", "make"), [("fp8", fp8_checkpoint), ("mxfp4", mxfp4_checkpoint)])
def test_experts_in_few_bits_stay_as_they_come_and_what_else_comes_so_is_read(frozen, make, order: str, tmp_path):
    base = make(tmp_path / "base")
    stock = load_model(str(base))
    model, places = blank(frozen, load_model(str(base)))
    tensors = list(Checkpoint.open(base).tensors())
    list(Filling(model, places, "base").through(ORDERS[order](tensors)))
    for layer, wanted in zip(moe_layers(model), moe_layers(stock), strict=True):
        held = dict(zip(layer.experts.stock_names, layer.experts.stacked(), strict=True))
        matrices = [name for name in held if "bias" not in name]
        assert len(matrices) == 2 and all(torch.equal(held[n], wanted.experts.get_parameter(n)) for n in matrices)
    others = [name for name, value in tensors if isinstance(value, PackedTensor) and name not in places]
    assert bool(others) == (frozen == "fp8")
    assert all(torch.equal(model.get_parameter(name), stock.get_parameter(name)) for name in others)


@pytest.mark.parametrize(("frozen", "make"), [("int8", fp8_checkpoint), ("fp8", mxfp4_checkpoint)])
def test_experts_that_come_in_another_format_than_they_are_kept_in_are_read(frozen: str, make, tmp_path):
    base = make(tmp_path / "base")
    model, places = blank(frozen, load_model(str(base)))
    list(Filling(model, places, "base").through(Checkpoint.open(base).tensors()))
    for layer, wanted in zip(moe_layers(model), moe_layers(swapped(load_model(str(base)), frozen)), strict=True):
        expected = wanted.experts.state_dict()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in layer.experts.state_dict().items())


@pytest.mark.parametrize("frozen", ["bf16", "nf4"])
def test_a_missing_tensor_is_named_at_the_end(frozen: str, tmp_path):
    base = save_tiny(tmp_path / "base")
    model, places = blank(frozen)
    with pytest.raises(esft.InputError, match=f"^base: tensor {UP.replace('up', '(gate|up)')} is missing$"):
        list(Filling(model, places, "base").through(t for t in Checkpoint.open(base).tensors() if t[0] != UP))


@pytest.mark.parametrize("missing", [False, True])
def test_what_another_rank_holds_has_to_come_as_well(missing: bool, tmp_path):
    model, base = tiny_model(), save_tiny(tmp_path / "base")
    places = expert_places(model)
    esft.swap(model, ExpertSelection({1: [5, 2]}), ranks=FirstOfTwo())
    (layer,) = [layer for layer in moe_layers(model) if layer.index == 2]
    assert isinstance(layer.experts, Experts) and not layer.experts.holds(7)
    tensors = [t for t in Checkpoint.open(base).tensors() if not missing or t[0] != UP]
    said = pytest.raises(esft.InputError, match=f"^base: tensor {UP.replace('up', '(gate|up)')} is missing$")
    with said if missing else nullcontext():
        assert [name for name, _ in Filling(model, places, "base").through(tensors)] == [name for name, _ in tensors]


def test_a_tensor_of_another_shape_is_named():
    model, places = blank("bf16")
    with pytest.raises(esft.InputError, match=rf"^base: tensor {UP}: has shape \(2,\), the model's has \(20, 32\)$"):
        list(Filling(model, places, "base").through([(UP, torch.zeros(2))]))


def test_weights_that_a_format_cannot_hold_are_named():
    model, places = blank("int8")
    down = UP.replace("up", "down")
    with pytest.raises(esft.InputError, match=f"^base: tensor {down}: int8: weights .* not finite"):
        list(Filling(model, places, "base").through([(down, torch.full((32, 20), torch.inf))]))


def test_gate_and_up_stay_in_fp8_only_where_a_block_ends_between_them(tmp_path):
    base = fp8_checkpoint(tmp_path / "base", moe_intermediate_size=192)
    model, places = blank("fp8", load_model(str(base)))
    said = r"^base: tensor .*(gate|up)_proj.weight: gate and up cannot be one matrix in fp8: 128 does not divide"
    with pytest.raises(esft.InputError, match=said):
        list(Filling(model, places, "base").through(Checkpoint.open(base).tensors()))

"""Where an adapter's tensors belong, in a model and in files."""

import pytest
import torch
from torch import Tensor

import esft
from esft.checkpoint.adapter_tensors import Piece, Place, Slot, adapter_slots
from esft.checkpoint.expert_tensors import ExpertTensor
from esft.checkpoint.other_tensors import Share, Strided
from esft.experts.moe_layers import moe_layers
from esft.selection import ExpertSelection
from tests.esft import zoo
from tests.esft.models import tiny_model

# The second column of a [3, 2] weight, and the last three elements of a stored tensor of five.
INSIDE, OUTSIDE = Strided((3,), (3,), (2,), 1), Strided((3,), (3,), (1,), 2)


def expert_tensor(part: str, transposed: bool = False) -> ExpertTensor:
    return ExpertTensor(1, 0, "name", "stored", False, 0, part, transposed)


def piece(weight: Tensor, part: ExpertTensor | Share, expert: int | None = None) -> Piece:
    return Piece(weight, "w", expert, part)


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        (Share("w"), [[0, 1], [2, 3], [4, 5], [6, 7]]),
        (Share("w", Strided((4,), (4,), (2,), 1)), [1, 3, 5, 7]),
        (expert_tensor("second half"), [[4, 5], [6, 7]]),
        (expert_tensor("in turn", transposed=True), [[0, 2, 4, 6], [1, 3, 5, 7]]),
    ],
)
def test_a_piece_reads_its_part_of_the_weight_and_puts_it_back(part, expected: list):
    weight = torch.arange(8.0).view(4, 2)
    found = piece(weight, part).read()
    assert found.tolist() == expected
    other = torch.full((4, 2), -1.0)
    piece(weight, part).put(other, found + 10)
    numbers = torch.tensor(expected).flatten()
    wanted = torch.full((8,), -1.0)
    wanted[numbers] = numbers + 10.0
    assert torch.equal(other.flatten(), wanted)
    assert torch.equal(weight, torch.arange(8.0).view(4, 2))  # only what it was told to write to
    value = torch.zeros(found.shape)
    piece(weight, part).give(value)
    assert torch.equal(value, found)


def test_a_piece_gives_and_takes_only_its_own_elements_of_a_tensor_that_holds_more():
    weight = torch.tensor([[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]])
    own = piece(weight, Share("w", INSIDE, OUTSIDE))
    value = torch.full((5,), -1.0)
    own.give(value)
    assert value.tolist() == [-1, -1, 1, 3, 5]
    own.put(weight, torch.arange(10.0).view(5, 2)[:, 1])  # not contiguous: 1, 3, 5, 7, 9
    assert weight.tolist() == [[0, 5], [2, 7], [4, 9]]


def test_a_whole_weight_may_be_a_part_of_a_stored_tensor():
    weight = torch.tensor([[7.0], [8.0], [9.0]])
    own = piece(weight, Share("w", None, OUTSIDE))
    value = torch.zeros(5)
    own.give(value)
    assert value.tolist() == [0, 0, 7, 8, 9]
    own.put(weight, torch.arange(5.0))
    assert weight.tolist() == [[2], [3], [4]]


def test_a_place_changes_all_of_a_tensor_or_what_its_piece_has_of_it():
    tensor, value = torch.zeros(3, 2), torch.arange(5.0)
    Place("w", None, (3, 2), piece(torch.zeros(3, 2), Share("w", INSIDE, OUTSIDE))).put(tensor, value)
    assert tensor.tolist() == [[0, 2], [0, 3], [0, 4]]
    whole = torch.zeros(5)
    Place("w", None, (5,), None).put(whole, value)
    assert torch.equal(whole, value)


def two_pieces() -> tuple[Slot, Tensor, Tensor]:
    first, second = torch.tensor([1.0, 2.0]).half(), torch.tensor([[0.0, 3.0], [0.0, 4.0], [0.0, 5.0]]).half()
    pieces = (
        Piece(first, "a", None, Share("a", None, Strided((2,), (2,), (1,), 0))),
        Piece(second, "b", 6, Share("b", INSIDE, OUTSIDE)),
    )
    return Slot("stored", 3, (5,), pieces), first, second


def test_a_slot_of_several_pieces_is_put_together_and_taken_apart():
    slot, first, second = two_pieces()
    value = slot.read()
    assert value.dtype == torch.float16 and value.tolist() == [1, 2, 3, 4, 5]
    value.zero_()
    assert first.tolist() == [1, 2]  # the value is a tensor of its own
    slot.write(torch.arange(10.0, 15.0))
    assert first.tolist() == [10, 11]
    assert second.tolist() == [[0, 12], [0, 13], [0, 14]]


def test_a_slot_of_one_piece_is_a_view():
    weight = torch.zeros(4, 2)
    slot = Slot("stored", None, (2, 2), (piece(weight, expert_tensor("first half")),))
    slot.read()[:] = 1
    assert weight.tolist() == [[1, 1], [1, 1], [0, 0], [0, 0]]
    slot.write(torch.full((2, 2), 2.0))
    assert weight.tolist() == [[2, 2], [2, 2], [0, 0], [0, 0]]


def test_a_slot_lies_in_one_place_of_original_files_and_in_each_pieces_own_in_others():
    slot, *_ = two_pieces()
    assert list(slot.places(as_in_memory=False)) == [Place("stored", 3, (5,), None)]
    places = list(slot.places(as_in_memory=True))
    assert [(p.name, p.index, p.shape) for p in places] == [("a", None, (2,)), ("b", 6, (3, 2))]
    assert all(place.piece is own for place, own in zip(places, slot.pieces, strict=True))


SELECTION = ExpertSelection({1: [5, 2], 2: [0]})
_SHARED = [f"mlp.shared_experts.{name}_proj.weight" for name in ("gate", "up", "down")]


def expected_experts() -> set[str]:
    return {
        f"model.layers.{layer}.mlp.experts.{expert}.{name}_proj.weight"
        for layer, expert in ((1, 5), (1, 2), (2, 0))
        for name in ("gate", "up", "down")
    }


@pytest.mark.parametrize("others", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("swapped", [False, True])
def test_an_adapter_holds_what_the_selection_trains(swapped: bool, shared: bool, others: bool):
    model = tiny_model()
    names = {name for name, _ in model.named_parameters() if ".experts." not in name}
    of_shared = {f"model.layers.{layer}.{name}" for layer in (1, 2) for name in _SHARED}
    assert of_shared < names
    selection = ExpertSelection(SELECTION.experts, shared, others)
    if swapped:
        esft.swap(model, selection)
    slots = adapter_slots(model, selection)
    wanted = expected_experts() | (of_shared if shared else set()) | (names - of_shared if others else set())
    assert slots.keys() == wanted
    for name, slot in slots.items():
        assert (slot.stored_name, slot.index) == (name, None)
        assert slot.shape == tuple(slot.read().shape)
        assert not slot.read().requires_grad
        if name in names:
            assert slot.read().data_ptr() == model.get_parameter(name).data_ptr()
            assert [(p.parameter, p.expert) for p in slot.pieces] == [(name, None)]


@pytest.mark.parametrize("swapped", [False, True])
def test_slots_of_experts_are_their_weights_in_the_model(swapped: bool):
    model = tiny_model()
    gate_up, down = (getattr(moe_layers(model)[0].experts, f"{n}_proj").detach().clone() for n in ("gate_up", "down"))
    if swapped:
        esft.swap(model, SELECTION)
    slots = adapter_slots(model, SELECTION)
    experts = "model.layers.1.mlp.experts"
    for expert in (5, 2):
        parts = {"gate": gate_up[expert][:20], "up": gate_up[expert][20:], "down": down[expert]}
        for name, expected in parts.items():
            slot = slots[f"{experts}.{expert}.{name}_proj.weight"]
            assert torch.equal(slot.read(), expected) and slot.shape == tuple(expected.shape)
            own = f"{experts}.{'down' if name == 'down' else 'gate_up'}_proj"
            assert [(p.parameter, p.expert) for p in slot.pieces] == [(own, expert)]
            slot.write(expected + 1)
    tuned = esft.unswap(model) if swapped else model
    for expert in range(8):
        change = float(expert in (5, 2))
        assert torch.equal(tuned.get_parameter(f"{experts}.gate_up_proj")[expert], gate_up[expert] + change)
        assert torch.equal(tuned.get_parameter(f"{experts}.down_proj")[expert], down[expert] + change)


def test_slices_of_stacked_experts_know_their_number():
    slots = adapter_slots(zoo.tiny("gpt_oss"), ExpertSelection({1: [6, 3]}))
    stacked = [f"model.layers.1.mlp.experts.{n}" for n in ("gate_up_proj", "down_proj")]
    stacked += [f"{name}_bias" for name in stacked]
    found = {(slot.stored_name, slot.index, slot.pieces[0].parameter, slot.pieces[0].expert) for slot in slots.values()}
    assert found == {(name, e, name, e) for name in stacked for e in (6, 3)}
    assert len(slots) == 8
    place = next(slots["model.layers.1.mlp.experts.6.down_proj_bias"].places(as_in_memory=True))
    assert (place.name, place.index, place.shape) == (stacked[3], 6, (32,))


def test_nothing_selected_is_nothing_to_save():
    assert adapter_slots(tiny_model(), ExpertSelection({})) == {}
    assert adapter_slots(tiny_model(), ExpertSelection({1: []})) == {}


def test_how_files_hold_experts_matters_only_where_experts_train(monkeypatch):
    def refuse(model):
        raise esft.InputError("the checkpoint stores experts in a way that is not supported")

    monkeypatch.setattr("esft.checkpoint.adapter_tensors.expert_tensors", refuse)
    assert len(adapter_slots(tiny_model(), ExpertSelection({1: []}, shared_experts=True))) == 6
    with pytest.raises(esft.InputError, match="stores experts in a way"):
        adapter_slots(tiny_model(), SELECTION)


@pytest.mark.parametrize(("shared", "others"), [(True, False), (False, True)])
def test_a_tensor_that_holds_what_trains_beside_what_does_not_is_refused(monkeypatch, shared: bool, others: bool):
    router, up = "model.layers.1.mlp.gate.weight", "model.layers.1.mlp.shared_experts.up_proj.weight"

    def convert(model, tensors: dict) -> dict:
        rest = {name: tensor for name, tensor in tensors.items() if name not in (router, up)}
        return rest | ({"fused": torch.cat([tensors[up], tensors[router]])} if up in tensors else {})

    monkeypatch.setattr("esft.checkpoint.other_tensors.to_stored", convert)
    message = f"^fused: the checkpoint stores {router}, {up} in one tensor, and the selection does not train them all"
    with pytest.raises(esft.InputError, match=message):
        adapter_slots(tiny_model(), ExpertSelection({}, shared, others))
    model = tiny_model()
    both = adapter_slots(model, ExpertSelection({}, True, True))["fused"]
    assert {piece.parameter for piece in both.pieces} == {up, router} and len(both.pieces) == 2
    assert torch.equal(both.read(), torch.cat([model.get_parameter(up), model.get_parameter(router)]))
    assert both.shape == (28, 32)


def test_a_tensor_that_holds_all_that_trains_is_no_mixture(monkeypatch):
    def convert(model, tensors: dict) -> dict:
        shared = [tensor.flatten() for name, tensor in tensors.items() if "shared" in name]
        rest = {name: tensor for name, tensor in tensors.items() if "shared" not in name}
        return rest | ({"fused": torch.cat(shared)} if shared else {})

    monkeypatch.setattr("esft.checkpoint.other_tensors.to_stored", convert)
    model = tiny_model(num_hidden_layers=2)  # of which one has experts
    slots = adapter_slots(model, ExpertSelection({}, shared_experts=True))
    assert slots.keys() == {"fused"}
    shared = moe_layers(model)[0].shared_experts[0]
    assert torch.equal(slots["fused"].read(), torch.cat([p.detach().flatten() for p in shared.parameters()]))


def test_a_norm_that_all_experts_share_belongs_to_no_expert():
    model = zoo.tiny("muse_spark")
    norms = {name for name, _ in model.named_parameters() if "post_expert_norm" in name}
    assert norms
    assert norms <= {
        p.parameter for s in adapter_slots(model, ExpertSelection({}, False, True)).values() for p in s.pieces
    }

"""Where an adapter's tensors belong, in a model and in files."""

import pytest
import torch
from torch import Tensor

import esft
from esft.checkpoint.adapter_tensors import AdapterTensor, adapter_tensors
from esft.checkpoint.views import WHOLE, Link, Part, StoredTensor, Strided
from esft.experts.moe_layers import moe_layers
from esft.selection import ExpertSelection
from tests.esft import zoo
from tests.esft.models import tiny_model

INSIDE, OUTSIDE = Strided((3,), (3,), (2,), 1), Strided((3,), (3,), (1,), 2)


def of_two_weights() -> tuple[AdapterTensor, Tensor, Tensor]:
    first, second = torch.tensor([1.0, 2.0]).half(), torch.tensor([[0.0, 3.0], [0.0, 4.0], [0.0, 5.0]]).half()
    links = Link("a", None, WHOLE, Strided((2,), (2,), (1,), 0)), Link("b", 6, INSIDE, OUTSIDE)
    return AdapterTensor(StoredTensor("stored", 3, (5,), links), (first, second)), first, second


def test_a_tensor_of_several_weights_is_put_together_and_taken_apart():
    tensor, first, second = of_two_weights()
    value = tensor.read()
    assert value.dtype == torch.float16 and value.tolist() == [1, 2, 3, 4, 5]
    value.zero_()
    assert first.tolist() == [1, 2]  # the value is a tensor of its own
    tensor.write(torch.arange(10.0, 15.0))
    assert first.tolist() == [10, 11]
    assert second.tolist() == [[0, 12], [0, 13], [0, 14]]


def test_a_tensor_of_one_weight_is_a_view():
    weight = torch.zeros(4, 2)
    link = Link("w", None, Part("first half"))
    tensor = AdapterTensor(StoredTensor("stored", None, (2, 2), (link,)), (weight,))
    tensor.read()[:] = 1
    assert weight.tolist() == [[1, 1], [1, 1], [0, 0], [0, 0]]
    tensor.write(torch.full((2, 2), 2.0))
    assert weight.tolist() == [[2, 2], [2, 2], [0, 0], [0, 0]]


def test_it_lies_in_one_tensor_of_original_files_and_in_each_weights_own_in_others():
    tensor, *_ = of_two_weights()
    assert list(tensor.in_files(as_in_memory=False)) == [(Link("stored", 3), (5,))]
    assert list(tensor.in_files(as_in_memory=True)) == list(zip(tensor.stored.links, [(2,), (3, 2)], strict=True))


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
    tensors = adapter_tensors(model, selection)
    wanted = expected_experts() | (of_shared if shared else set()) | (names - of_shared if others else set())
    assert tensors.keys() == wanted
    for name, tensor in tensors.items():
        assert (tensor.stored.name, tensor.stored.expert) == (name, None)
        assert tensor.shape == tuple(tensor.read().shape)
        assert not tensor.read().requires_grad
        if name in names:
            assert tensor.read().data_ptr() == model.get_parameter(name).data_ptr()
            assert [(p.parameter, p.expert) for p in tensor.stored.links] == [(name, None)]


@pytest.mark.parametrize("swapped", [False, True])
def test_tensors_of_experts_are_their_weights_in_the_model(swapped: bool):
    model = tiny_model()
    gate_up, down = (getattr(moe_layers(model)[0].experts, f"{n}_proj").detach().clone() for n in ("gate_up", "down"))
    if swapped:
        esft.swap(model, SELECTION)
    tensors = adapter_tensors(model, SELECTION)
    experts = "model.layers.1.mlp.experts"
    for expert in (5, 2):
        parts = {"gate": gate_up[expert][:20], "up": gate_up[expert][20:], "down": down[expert]}
        for name, expected in parts.items():
            tensor = tensors[f"{experts}.{expert}.{name}_proj.weight"]
            assert torch.equal(tensor.read(), expected) and tensor.shape == tuple(expected.shape)
            own = f"{experts}.{'down' if name == 'down' else 'gate_up'}_proj"
            assert [(p.parameter, p.expert) for p in tensor.stored.links] == [(own, expert)]
            tensor.write(expected + 1)
    tuned = esft.unswap(model) if swapped else model
    for expert in range(8):
        change = float(expert in (5, 2))
        assert torch.equal(tuned.get_parameter(f"{experts}.gate_up_proj")[expert], gate_up[expert] + change)
        assert torch.equal(tuned.get_parameter(f"{experts}.down_proj")[expert], down[expert] + change)


def test_slices_of_stacked_experts_know_their_number():
    tensors = adapter_tensors(zoo.tiny("gpt_oss"), ExpertSelection({1: [6, 3]}))
    stacked = [f"model.layers.1.mlp.experts.{n}" for n in ("gate_up_proj", "down_proj")]
    stacked += [f"{name}_bias" for name in stacked]
    found = {
        (t.name, t.expert, link.parameter, link.expert)
        for t in (tensor.stored for tensor in tensors.values())
        for link in t.links
    }
    assert found == {(name, e, name, e) for name in stacked for e in (6, 3)}
    assert len(tensors) == 8
    in_files = tensors["model.layers.1.mlp.experts.6.down_proj_bias"].in_files(as_in_memory=True)
    assert list(in_files) == [(Link(stacked[3], 6), (32,))]


@pytest.mark.parametrize(("layer", "expert"), [(7, 0), (1, 8)])
def test_a_selection_that_does_not_fit_the_model_is_refused(layer: int, expert: int):
    with pytest.raises(esft.InputError, match="^selection names"):
        adapter_tensors(tiny_model(), ExpertSelection({layer: [expert]}))


def test_nothing_selected_is_nothing_to_save():
    assert adapter_tensors(tiny_model(), ExpertSelection({})) == {}
    assert adapter_tensors(tiny_model(), ExpertSelection({1: []})) == {}


def test_how_files_hold_experts_matters_only_where_experts_train(monkeypatch):
    def refuse(model, *known):
        raise esft.InputError("the checkpoint stores experts in a way that is not supported")

    monkeypatch.setattr("esft.checkpoint.adapter_tensors.expert_tensors", refuse)
    assert len(adapter_tensors(tiny_model(), ExpertSelection({1: []}, shared_experts=True))) == 6
    with pytest.raises(esft.InputError, match="stores experts in a way"):
        adapter_tensors(tiny_model(), SELECTION)


@pytest.mark.parametrize(("shared", "others"), [(True, False), (False, True)])
def test_a_tensor_that_holds_what_trains_beside_what_does_not_is_refused(monkeypatch, shared: bool, others: bool):
    router, up = "model.layers.1.mlp.gate.weight", "model.layers.1.mlp.shared_experts.up_proj.weight"

    def convert(model, conversions, tensors: dict) -> dict:
        rest = {name: tensor for name, tensor in tensors.items() if name not in (router, up)}
        return rest | ({"fused": torch.cat([tensors[up], tensors[router]])} if up in tensors else {})

    monkeypatch.setattr("esft.checkpoint.original_format.revert", convert)
    message = f"^fused: the checkpoint stores {router}, {up} in one tensor, and the selection does not train them all"
    with pytest.raises(esft.InputError, match=message):
        adapter_tensors(tiny_model(), ExpertSelection({}, shared, others))
    model = tiny_model()
    both = adapter_tensors(model, ExpertSelection({}, True, True))["fused"]
    assert {link.parameter for link in both.stored.links} == {up, router} and len(both.stored.links) == 2
    assert torch.equal(both.read(), torch.cat([model.get_parameter(up), model.get_parameter(router)]))
    assert both.shape == (28, 32)


def test_a_tensor_that_holds_all_that_trains_is_no_mixture(monkeypatch):
    def convert(model, conversions, tensors: dict) -> dict:
        shared = [tensor.flatten() for name, tensor in tensors.items() if "shared" in name]
        rest = {name: tensor for name, tensor in tensors.items() if "shared" not in name}
        return rest | ({"fused": torch.cat(shared)} if shared else {})

    monkeypatch.setattr("esft.checkpoint.original_format.revert", convert)
    model = tiny_model(num_hidden_layers=2)  # of which one has experts
    tensors = adapter_tensors(model, ExpertSelection({}, shared_experts=True))
    assert tensors.keys() == {"fused"}
    shared = moe_layers(model)[0].shared_experts[0]
    assert torch.equal(tensors["fused"].read(), torch.cat([p.detach().flatten() for p in shared.parameters()]))


def test_a_norm_that_all_experts_share_belongs_to_no_expert():
    model = zoo.tiny("muse_spark")
    norms = {name for name, _ in model.named_parameters() if "post_expert_norm" in name}
    assert norms
    assert norms <= {
        p.parameter for s in adapter_tensors(model, ExpertSelection({}, False, True)).values() for p in s.stored.links
    }

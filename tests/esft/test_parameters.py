import re

import pytest
import torch
from esft.parameters import strided
from esft.select import ExpertSelection
from esft.slots import adapter_slots

import esft
from tests.esft.models import tiny_model

NUMBERS = torch.arange(24).view(4, 6)
SELECTIONS = {
    "whole": NUMBERS,
    "rows": NUMBERS[1:3],
    "columns": NUMBERS[:, 2:5],
    "transposed": NUMBERS.T,
    "rows in turn": NUMBERS.unflatten(0, (2, 2)).transpose(0, 1).flatten(0, 1),
    "heads permuted": NUMBERS.view(2, 2, 6).transpose(0, 1).reshape(4, 6)[:2],
    "one": NUMBERS[2, 3],
}


@pytest.mark.parametrize("name", SELECTIONS)
def test_elements_that_are_strided_are_read_and_written_without_numbers(name: str):
    numbers = SELECTIONS[name]
    found = strided(numbers.flatten(), tuple(numbers.shape))
    assert found is not None
    tensor = torch.randn(5, 6)[1:]  # which begins within its storage
    assert torch.equal(found.read(tensor), tensor.flatten()[numbers])
    value, expected = torch.randn(numbers.shape), tensor.clone()
    expected.view(-1)[numbers.flatten()] = value.flatten()
    found.write(tensor, value)
    assert torch.equal(tensor, expected)


@pytest.mark.parametrize("numbers", [[0, 1, 3], [3, 2, 1], [0, 1, 4, 5, 7, 8], [0, 2, 1, 3, 5, 4]])
def test_elements_that_are_not_strided_are_told(numbers: list[int]):
    assert strided(torch.tensor(numbers), (len(numbers),)) is None


GATE_AND_UP = r"shared_experts\.(gate|up)_proj"


def fuse(monkeypatch, fused, names: str = GATE_AND_UP) -> None:
    """Let checkpoints hold two parameters of each layer in one tensor."""

    def convert(model, tensors: dict) -> dict:
        parts = {name: tensor for name, tensor in tensors.items() if re.search(names, name)}
        rest = {name: tensor for name, tensor in tensors.items() if name not in parts}
        layer = min(parts, default="").partition(".mlp")[0]
        return rest | ({f"{layer}.mlp.w13": fused(*parts.values())} if parts else {})

    monkeypatch.setattr("esft.parameters.to_stored", convert)


@pytest.mark.parametrize(
    "fused",
    [
        lambda gate, up: torch.cat([gate, up]),
        lambda gate, up: torch.cat([gate.T, up.T], dim=1),
        lambda gate, up: torch.stack([gate, up], dim=1).flatten(0, 1),
    ],
    ids=["one after the other", "transposed", "in turn"],
)
def test_parameters_that_a_checkpoint_fuses_are_one_tensor_of_the_adapter(monkeypatch, tmp_path, fused):
    fuse(monkeypatch, fused)
    model = esft.swap(tiny_model(), ExpertSelection({}, shared_experts=True))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    esft.save_adapter(model, tmp_path / "a")
    name = "model.layers.1.mlp.w13"
    shared = model.model.layers[1].mlp.shared_experts
    slot = adapter_slots(model, ExpertSelection({}, shared_experts=True))[name]
    assert torch.equal(slot.read(), fused(shared.gate_proj.weight, shared.up_proj.weight))
    # Files that hold tensors as the model does change in both places.
    assert [place.name for place in slot.places(as_in_memory=True)] == [
        f"model.layers.1.mlp.shared_experts.{p}_proj.weight" for p in ("gate", "up")
    ]
    other = esft.load_adapter(tiny_model(), tmp_path / "a")
    expected = esft.unswap(model).state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in other.state_dict().items())


def test_fused_parameters_that_cannot_be_followed_or_not_all_train_are_refused(monkeypatch):
    model = tiny_model()
    order = torch.randperm(2 * 20 * 32, generator=torch.Generator().manual_seed(0))
    fuse(monkeypatch, lambda gate, up: torch.cat([gate, up]).flatten()[order.to(gate.device)])
    with pytest.raises(esft.InputError, match=r"w13: the checkpoint stores .* in a way that is not supported"):
        adapter_slots(model, ExpertSelection({}, shared_experts=True))
    fuse(monkeypatch, lambda gate, up: torch.cat([gate, up]), r"shared_experts\.up_proj|mlp\.gate\.weight")
    with pytest.raises(esft.InputError, match="gate.weight, .*up_proj.weight in one tensor, and the selection does"):
        adapter_slots(model, ExpertSelection({}, shared_experts=True))

import re

import pytest
import torch

import esft
from esft.checkpoint.adapter_tensors import adapter_slots
from esft.checkpoint.other_tensors import Share, StoredTensor, Strided, stored_tensors, strided
from esft.selection import ExpertSelection
from tests.esft import zoo
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


@pytest.mark.parametrize(
    ("numbers", "sizes", "strides", "offset"),
    [
        ([7], (), (), 7),
        ([3, 4, 5], (3,), (1,), 3),
        ([2, 7, 12], (3,), (5,), 2),
        ([0, 1, 10, 11, 20, 21], (3, 2), (10, 1), 0),
        ([1, 5, 3, 7], (2, 2), (2, 4), 1),
        ([0, 3, 1, 4, 20, 23, 21, 24], (2, 2, 2), (20, 1, 3), 0),
        ([4, 4, 4], (3,), (0,), 4),
    ],
)
def test_loops_are_told_from_the_numbers_that_they_count(numbers: list[int], sizes, strides, offset: int):
    found = strided(torch.tensor(numbers), (1, len(numbers)))
    assert found == Strided((1, len(numbers)), sizes, strides, offset)
    assert all(type(n) is int for n in (*found.sizes, *found.strides, found.offset))
    tensor = torch.arange(30.0)
    assert torch.equal(found.read(tensor), torch.tensor([numbers], dtype=torch.float32))


def test_a_tensor_that_does_not_lie_in_order_is_an_error_and_not_read_wrongly():
    some = Strided((2,), (2,), (1,), 0)
    with pytest.raises(RuntimeError, match="view"):
        some.read(torch.zeros(3, 2).T)
    with pytest.raises(RuntimeError, match="view"):
        some.write(torch.zeros(3, 2).T, torch.ones(2))


@pytest.mark.parametrize(
    "numbers",
    [
        [0, 1, 3],
        [3, 2, 1],
        [0, 1, 4, 5, 7, 8],
        [0, 2, 1, 3, 5, 4],
        [0, 1, 10, 12],  # whose first loop changes its step
        [0, 1, 10, 11, 20, 22],
        [0, 1, 10, 11, 5, 6],  # whose second goes back
        [10, 11, 0, 1],
    ],
)
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

    monkeypatch.setattr("esft.checkpoint.other_tensors.to_stored", convert)


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


@pytest.mark.parametrize("names", [["model.norm.weight"], ["model.layers.0.mlp.shared_experts.up_proj.weight"]])
def test_a_parameter_that_is_only_renamed_is_all_of_its_tensor_and_takes_no_memory(monkeypatch, names: list[str]):
    model, seen = tiny_model(), []
    parameters = {name: torch.randn(3, 2) for name in names}

    def convert(model, tensors: dict) -> dict:
        seen.extend(tensor.device.type for tensor in tensors.values())
        return {"stored." + name: tensor for name, tensor in tensors.items()}

    monkeypatch.setattr("esft.checkpoint.other_tensors.to_stored", convert)
    assert stored_tensors(model, parameters) == {
        f"stored.{name}": StoredTensor((3, 2), (Share(name, None, None),)) for name in names
    }
    assert seen == ["meta"]


def test_parameters_are_found_under_the_checkpoints_names_and_in_its_parts():
    model = zoo.tiny("kimi_linear")
    conv, gate = "model.layers.0.self_attn.conv1d.weight", "model.layers.1.mlp.gate.weight"
    found = stored_tensors(model, {name: model.get_parameter(name) for name in (conv, gate, "model.norm.weight")})
    # The files have one convolution each for queries, keys and values, of 32 channels.
    expected = {
        f"model.layers.0.self_attn.{which}_conv1d.weight": StoredTensor(
            (32, 1, 4), (Share(conv, Strided((32, 1, 4), (128,), (1,), 128 * place), None),)
        )
        for place, which in enumerate("qkv")
    }
    expected["model.layers.1.block_sparse_moe.gate.weight"] = StoredTensor((8, 32), (Share(gate),))
    expected["model.norm.weight"] = StoredTensor((32,), (Share("model.norm.weight"),))
    assert found == expected


def test_what_two_parameters_have_of_a_tensor_is_told_of_each(monkeypatch):
    fuse(monkeypatch, lambda gate, up: torch.cat([gate, up[1:]], dim=1), r"\.(gate|up)_proj")
    gate, up = "model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj"
    found = stored_tensors(tiny_model(), {gate: torch.zeros(2, 3), up: torch.zeros(3, 2), "other": torch.zeros(1)})
    # [[g0 g1 g2 u2 u3], [g3 g4 g5 u4 u5]]
    shares = (
        Share(gate, Strided((6,), (6,), (1,), 0), Strided((6,), (2, 3), (5, 1), 0)),
        Share(up, Strided((4,), (4,), (1,), 2), Strided((4,), (2, 2), (5, 1), 3)),
    )
    assert found == {
        "model.layers.1.mlp.w13": StoredTensor((2, 5), shares),
        "other": StoredTensor((1,), (Share("other"),)),
    }


@pytest.mark.parametrize(
    ("fused", "blamed"),
    [
        (lambda gate, up: torch.cat([gate.flatten(), up.flatten()[[0, 2, 3, 1]]]), "up_proj"),
        (lambda gate, up: torch.cat([gate.flatten()[[0, 2, 3, 1]], up.flatten()]), "gate_proj"),
        (lambda gate, up: gate.flatten()[[0, 2, 3, 1]], "gate_proj"),
        # In the order that they have, but at irregular places.
        (lambda gate, up: torch.cat([gate.flatten(), up.flatten()])[[0, 4, 5, 1, 2, 3, 6, 7]], "gate_proj"),
        (lambda gate, up: torch.cat([gate.flatten()[:1], up.flatten()])[[1, 0, 2, 3, 4]], "up_proj"),
    ],
    ids=["second", "first", "alone", "places", "places of the second"],
)
def test_elements_in_an_order_that_is_not_regular_are_refused_with_both_names(monkeypatch, fused, blamed: str):
    fuse(monkeypatch, fused, r"\.(gate|up)_proj")
    layer = "model.layers.1.mlp"
    parameters = {f"{layer}.{name}_proj": torch.zeros(2, 2) for name in ("gate", "up")}
    with pytest.raises(esft.InputError, match=f"^{layer}.w13: the checkpoint stores {layer}.{blamed} in a way that"):
        stored_tensors(tiny_model(), parameters)


def test_fused_parameters_that_cannot_be_followed_or_not_all_train_are_refused(monkeypatch):
    model = tiny_model()
    order = torch.randperm(2 * 20 * 32, generator=torch.Generator().manual_seed(0))
    fuse(monkeypatch, lambda gate, up: torch.cat([gate, up]).flatten()[order.to(gate.device)])
    with pytest.raises(esft.InputError, match=r"w13: the checkpoint stores .* in a way that is not supported"):
        adapter_slots(model, ExpertSelection({}, shared_experts=True))
    fuse(monkeypatch, lambda gate, up: torch.cat([gate, up]), r"shared_experts\.up_proj|mlp\.gate\.weight")
    with pytest.raises(esft.InputError, match="gate.weight, .*up_proj.weight in one tensor, and the selection does"):
        adapter_slots(model, ExpertSelection({}, shared_experts=True))

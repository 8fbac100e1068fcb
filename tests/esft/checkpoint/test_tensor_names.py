import copy
import re

import pytest
import torch
from transformers.core_model_loading import revert_weight_conversion

import esft
from esft.checkpoint import tensor_names
from esft.checkpoint.adapter_tensors import adapter_tensors
from esft.checkpoint.original_format import original_format
from esft.checkpoint.tensor_names import ExpertTensors, slice_name
from esft.checkpoint.views import WHOLE, Link, Part, StoredTensor, Strided
from esft.experts.moe_layers import moe_layers, stock_weights
from esft.selection import ExpertSelection
from tests.esft import test_multimodal as multimodal
from tests.esft import zoo
from tests.esft.experts import test_moe_layers as families
from tests.esft.experts.test_stock_layout import listed
from tests.esft.models import tiny_model

ROWS = {"all": [0, 1, 2, 3], "first half": [0, 1], "second half": [2, 3], "in turn": [0, 2, 1, 3]}

# Of layer 1: expert 3's name, the file's where that is another, whether it is stacked, projection, rows, transposed.
_W, _S, _K = "model.layers.1.block_sparse_moe", "model.layers.1.mlp.experts", "model.llm.layers.1.mlp.experts"
_V, _N = "model.language_model.layers.1.mlp.experts", "backbone.layers.1.mixer.experts"
FORMS = {
    "mixtral": [
        (f"{_W}.experts.3.w1.weight", None, False, 0, "first half", False),
        (f"{_W}.experts.3.w3.weight", None, False, 0, "second half", False),
        (f"{_W}.experts.3.w2.weight", None, False, 1, "all", False),
    ],
    "nemotron_h": [
        (f"{_N}.3.up_proj.weight", None, False, 0, "all", False),
        (f"{_N}.3.down_proj.weight", None, False, 1, "all", False),
    ],
    "granitemoe": [
        (f"{_W}.3.input_linear.weight", f"{_W}.input_linear.weight", True, 0, "all", False),
        (f"{_W}.3.output_linear.weight", f"{_W}.output_linear.weight", True, 1, "all", False),
    ],
    "gpt_oss": [
        (f"{_S}.3.{name}", f"{_S}.{name}", True, projection, "all", False)
        for projection, name in enumerate(("gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias"))
    ],
    "inkling2": [
        (f"{_K}.3.w13_weight", f"{_K}.w13_weight", True, 0, "in turn", False),
        (f"{_K}.3.w2_weight", f"{_K}.w2_weight", True, 1, "all", False),
    ],
    "qwen3_vl_moe": [
        (f"{_V}.3.gate_up_proj", f"{_V}.gate_up_proj", True, 0, "all", True),
        (f"{_V}.3.down_proj", f"{_V}.down_proj", True, 1, "all", True),
    ],
}


def expert_tensors(model) -> ExpertTensors:
    return tensor_names.expert_tensors(model, stock_weights(model).experts, original_format(model))


def other_tensors(model, parameters: dict[str, torch.Tensor]) -> dict[str, StoredTensor]:
    return tensor_names.other_tensors(original_format(model), parameters)


def every(tensors: ExpertTensors) -> list[StoredTensor]:
    return [tensor for of_one in tensors.values() for tensor in of_one.values()]


def built(family: str):
    return multimodal.tiny() if family == "qwen3_vl_moe" else zoo.tiny(family)


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("family", FORMS)
def test_every_expert_is_found_in_the_checkpoint(family: str, swapped: bool):
    model = built(family)
    if swapped:
        families.swapped(model, ExpertSelection({1: [3]}))
    layers = moe_layers(model)
    tensors = expert_tensors(model)
    parameters = list(layers[[layer.index for layer in layers].index(1)].weights(3))
    found = {(name, t.name, t.expert, *t.links) for name, t in tensors[1, 3].items()}
    expected = {
        (name, stored or name, 3 if stacked else None, Link(parameters[projection], 3, Part(rows, transposed)))
        for name, stored, stacked, projection, rows, transposed in FORMS[family]
    }
    assert found == expected
    assert tensors.keys() == {(layer.index, e) for layer in layers for e in range(8)}
    assert all(len(of_one) == len(expected) for of_one in tensors.values())
    assert len({name for of_one in tensors.values() for name in of_one}) == 8 * len(expected) * len(layers)
    assert all(type(link.expert) is int for of_one in tensors.values() for t in of_one.values() for link in t.links)
    assert expert_tensors(model) is tensors  # found once


@pytest.mark.parametrize("family", FORMS)
def test_what_is_read_of_the_weights_is_what_transformers_writes(family: str):
    model = built(family)
    written = revert_weight_conversion(model, copy.copy(model.state_dict()))
    layers = {layer.index: layer for layer in moe_layers(model)}
    for (index, expert), tensors in expert_tensors(model).items():
        for tensor in tensors.values():
            expected = written[tensor.name]
            expected = expected if tensor.expert is None else expected[tensor.expert]
            if family == "qwen3_vl_moe":  # transformers keeps the model's own form; the hub's files are the original
                expected = expected.mT
            (link,) = tensor.links
            assert torch.equal(link.inside.read(layers[index].weights(expert)[link.parameter]), expected)
            assert tensor.shape == tuple(expected.shape)


def test_experts_in_a_module_list_have_the_models_own_names():
    model = listed(tiny_model())
    shapes = {"gate_proj": (20, 32), "up_proj": (20, 32), "down_proj": (32, 20)}
    names = {f"model.layers.2.mlp.experts.7.{part}.weight": shape for part, shape in shapes.items()}
    assert expert_tensors(model)[2, 7] == {
        name: StoredTensor(name, None, shape, (Link(name),)) for name, shape in names.items()
    }
    assert len(expert_tensors(model)) == 2 * 8


@pytest.mark.parametrize(
    ("stacked", "expected"),
    [
        ("model.layers.3.mlp.experts.gate_up_proj", "model.layers.3.mlp.experts.17.gate_up_proj"),
        ("model.layers.3.mlp.experts.fc1.weight", "model.layers.3.mlp.experts.17.fc1.weight"),
        ("layers.3.mlp.experts.mlp.w1.weight", "layers.3.mlp.experts.17.mlp.w1.weight"),
        ("experts.3.experts.w1", "experts.3.experts.17.w1"),
        ("layers.3.block_sparse_moe.input_linear.weight", "layers.3.block_sparse_moe.17.input_linear.weight"),
        ("layers.3.block_sparse_moe.input_linear", "layers.3.block_sparse_moe.17.input_linear"),
        ("layers.3.moe.weights", "layers.3.moe.17.weights"),
    ],
)
def test_a_slices_name_has_the_number_where_one_by_one_names_have_it(stacked: str, expected: str):
    assert slice_name(stacked, 17) == expected


@pytest.mark.parametrize(
    "mixed",
    [
        lambda x: x.transpose(0, 1),  # expert by expert along the second dimension
        lambda x: x.flatten(0, 1),
        lambda x: x[:4],
        lambda x: x[:1],
        lambda x: x.flip(0),
        lambda x: x.flip(1),
        lambda x: x[0].flip(0),
        lambda x: x[0][:-1],
        lambda x: x.flatten(1),
    ],
    ids=["second", "in one", "some", "one", "from the last", "rows back", "of one back", "of one a part", "flat"],
)
def test_a_checkpoint_in_which_experts_have_no_slice_of_their_own_is_refused(monkeypatch, mixed):
    def convert(model, conversions, state):
        return {name: mixed(tensor) for name, tensor in state.items()}

    monkeypatch.setattr("esft.checkpoint.original_format.revert", convert)
    with pytest.raises(
        esft.InputError, match="0.mlp.experts.gate_up_proj: the checkpoint stores experts in a way that"
    ):
        expert_tensors(zoo.tiny("mixtral"))


@pytest.mark.parametrize(("family", "transposed"), [("mixtral", False), ("gpt_oss", True)])
@pytest.mark.parametrize(("rows", "numbers"), ROWS.items())
def test_which_rows_the_files_hold_is_told_from_where_the_numbers_come_out(
    monkeypatch, rows: str, numbers: list[int], family: str, transposed: bool
):
    # A probe has two gates before two ups, in the model as its rows or its columns.
    def convert(model, conversions, state):
        gate_up = {name: tensor for name, tensor in state.items() if name.endswith("gate_up_proj")}
        return state | {name: (tensor.mT if transposed else tensor)[:, numbers] for name, tensor in gate_up.items()}

    monkeypatch.setattr("esft.checkpoint.original_format.revert", convert)
    found = [t for t in every(expert_tensors(zoo.tiny(family))) if t.name.endswith("gate_up_proj")]
    assert {t.links[0].inside for t in found} == {Part(rows, transposed)}
    assert [t.expert for t in found] == [t.links[0].expert for t in found] == [*range(8)] * 2


@pytest.mark.parametrize(
    ("family", "ending", "mixed"),
    [("mixtral", "down_proj", lambda x: x[:, : x.shape[1] // 2]), ("gpt_oss", "down_proj_bias", lambda x: x.flip(1))],
    ids=["half of what has no halves", "a bias from its end"],
)
def test_what_no_layout_has_is_refused_with_the_tensors_name(monkeypatch, family: str, ending: str, mixed):
    def convert(model, conversions, state):
        return {name: mixed(tensor) if name.endswith(ending) else tensor for name, tensor in state.items()}

    monkeypatch.setattr("esft.checkpoint.original_format.revert", convert)
    with pytest.raises(esft.InputError, match=f"0.mlp.experts.{ending}: the checkpoint stores experts in a way that"):
        expert_tensors(zoo.tiny(family))


def test_a_single_expert_is_stacked_like_several():
    model = zoo.tiny("gpt_oss", num_experts=1, num_local_experts=1, num_experts_per_tok=1)
    assert {(t.expert, t.links[0].inside) for t in every(expert_tensors(model))} == {(0, WHOLE)}


def test_layers_that_share_a_number_are_numbered_by_their_place():
    layers = moe_layers(zoo.tiny("ernie4_5_vl_moe"))
    assert [layer.index for layer in layers] == [0, 1, 2, 3]
    assert [layer.name.split(".")[3] for layer in layers] == ["text_moe", "vision_moe"] * 2


GATE_AND_UP = r"shared_experts\.(gate|up)_proj"


def fuse(monkeypatch, fused, names: str = GATE_AND_UP) -> None:
    """Let checkpoints hold two parameters of each layer in one tensor."""

    def convert(model, conversions, tensors: dict) -> dict:
        parts = {name: tensor for name, tensor in tensors.items() if re.search(names, name)}
        rest = {name: tensor for name, tensor in tensors.items() if name not in parts}
        layer = min(parts, default="").partition(".mlp")[0]
        return rest | ({f"{layer}.mlp.w13": fused(*parts.values())} if parts else {})

    monkeypatch.setattr("esft.checkpoint.original_format.revert", convert)


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
    tensor = adapter_tensors(model, ExpertSelection({}, shared_experts=True))[name]
    assert torch.equal(tensor.read(), fused(shared.gate_proj.weight, shared.up_proj.weight))
    # Files that hold tensors as the model does change in both places.
    assert [link.parameter for link, _ in tensor.in_files(as_in_memory=True)] == [
        f"model.layers.1.mlp.shared_experts.{p}_proj.weight" for p in ("gate", "up")
    ]
    other = esft.load_adapter(tiny_model(), tmp_path / "a")
    expected = esft.unswap(model).state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in other.state_dict().items())


@pytest.mark.parametrize("names", [["model.norm.weight"], ["model.layers.0.mlp.shared_experts.up_proj.weight"]])
def test_a_parameter_that_is_only_renamed_is_all_of_its_tensor_and_takes_no_memory(monkeypatch, names: list[str]):
    model, seen = tiny_model(), []
    parameters = {name: torch.randn(3, 2) for name in names}

    def convert(model, conversions, tensors: dict) -> dict:
        seen.extend(tensor.device.type for tensor in tensors.values())
        return {"stored." + name: tensor for name, tensor in tensors.items()}

    monkeypatch.setattr("esft.checkpoint.original_format.revert", convert)
    assert other_tensors(model, parameters) == {
        f"stored.{name}": StoredTensor(f"stored.{name}", None, (3, 2), (Link(name),)) for name in names
    }
    assert seen == ["meta"]


def test_parameters_are_found_under_the_checkpoints_names_and_in_its_parts():
    model = zoo.tiny("kimi_linear")
    conv, gate = "model.layers.0.self_attn.conv1d.weight", "model.layers.1.mlp.gate.weight"
    found = other_tensors(model, {name: model.get_parameter(name) for name in (conv, gate, "model.norm.weight")})
    # The files have one convolution each for queries, keys and values, of 32 channels.
    expected = {
        f"model.layers.0.self_attn.{which}_conv1d.weight": (
            (32, 1, 4),
            (Link(conv, None, Strided((32, 1, 4), (128,), (1,), 128 * number)),),
        )
        for number, which in enumerate("qkv")
    }
    expected["model.layers.1.block_sparse_moe.gate.weight"] = (8, 32), (Link(gate),)
    expected["model.norm.weight"] = (32,), (Link("model.norm.weight"),)
    assert found == {name: StoredTensor(name, None, *rest) for name, rest in expected.items()}


def test_what_two_parameters_have_of_a_tensor_is_told_of_each(monkeypatch):
    fuse(monkeypatch, lambda gate, up: torch.cat([gate, up[1:]], dim=1), r"\.(gate|up)_proj")
    gate, up = "model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj"
    found = other_tensors(tiny_model(), {gate: torch.zeros(2, 3), up: torch.zeros(3, 2), "other": torch.zeros(1)})
    # [[g0 g1 g2 u2 u3], [g3 g4 g5 u4 u5]]
    links = (
        Link(gate, None, Strided((6,), (6,), (1,), 0), Strided((6,), (2, 3), (5, 1), 0)),
        Link(up, None, Strided((4,), (4,), (1,), 2), Strided((4,), (2, 2), (5, 1), 3)),
    )
    fused = "model.layers.1.mlp.w13"
    assert found == {
        fused: StoredTensor(fused, None, (2, 5), links),
        "other": StoredTensor("other", None, (1,), (Link("other"),)),
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
        other_tensors(tiny_model(), parameters)


def test_fused_parameters_that_cannot_be_followed_or_not_all_train_are_refused(monkeypatch):
    model = tiny_model()
    order = torch.randperm(2 * 20 * 32, generator=torch.Generator().manual_seed(0))
    fuse(monkeypatch, lambda gate, up: torch.cat([gate, up]).flatten()[order.to(gate.device)])
    with pytest.raises(esft.InputError, match=r"w13: the checkpoint stores .* in a way that is not supported"):
        adapter_tensors(model, ExpertSelection({}, shared_experts=True))
    fuse(monkeypatch, lambda gate, up: torch.cat([gate, up]), r"shared_experts\.up_proj|mlp\.gate\.weight")
    with pytest.raises(esft.InputError, match="gate.weight, .*up_proj.weight in one tensor, and the selection does"):
        adapter_tensors(model, ExpertSelection({}, shared_experts=True))

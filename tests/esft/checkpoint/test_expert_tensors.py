import copy

import pytest
import torch
from transformers.core_model_loading import revert_weight_conversion

import esft
from esft.checkpoint.expert_tensors import ExpertTensor, expert_tensors, expert_weights, slice_name, stock_names
from esft.experts.model_state import model_state
from esft.experts.moe_layers import moe_layers
from esft.selection import ExpertSelection
from tests.esft import test_multimodal as multimodal
from tests.esft import zoo
from tests.esft.experts import test_moe_layers as families
from tests.esft.experts.test_stock_layout import listed
from tests.esft.models import tiny_model

PARTS = {"whole": [0, 1, 2, 3], "first half": [0, 1], "second half": [2, 3], "in turn": [0, 2, 1, 3]}


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("part", "rows"), PARTS.items())
def test_what_is_read_can_be_written_back(part: str, rows: list[int], transposed: bool):
    weight = torch.randn(5, 4) if transposed else torch.randn(4, 5)
    tensor = ExpertTensor(0, 0, "", "", False, 0, part, transposed)
    stored = tensor.read(weight)
    assert torch.equal(stored, (weight.T if transposed else weight)[rows])
    before, new = weight.clone(), torch.randn(stored.shape)
    tensor.write(weight, new)
    assert torch.equal(tensor.read(weight), new)
    others = [row for row in range(4) if row not in rows]
    assert torch.equal(*((w.T if transposed else w)[others] for w in (weight, before)))


def test_what_is_read_is_a_view_where_that_can_be():
    weight = torch.zeros(4, 5)
    for part in ("whole", "first half", "second half"):
        ExpertTensor(0, 0, "", "", False, 0, part, True).read(weight[:, :4])[:] += 1
    assert torch.equal(weight[:, :4], torch.full((4, 4), 2.0))
    value = torch.arange(8).view(2, 4)
    ExpertTensor(0, 0, "", "", False, 0, "whole", False).write(weight[:2, :4], value.flatten())  # of the same elements
    assert torch.equal(weight[:2, :4], value.float())


# Of layer 1: expert 3's name, the file's where that is another, whether it is stacked, projection, part, transposed.
_W, _S, _K = "model.layers.1.block_sparse_moe", "model.layers.1.mlp.experts", "model.llm.layers.1.mlp.experts"
_V, _N = "model.language_model.layers.1.mlp.experts", "backbone.layers.1.mixer.experts"
FORMS = {
    "mixtral": [
        (f"{_W}.experts.3.w1.weight", None, False, 0, "first half", False),
        (f"{_W}.experts.3.w3.weight", None, False, 0, "second half", False),
        (f"{_W}.experts.3.w2.weight", None, False, 1, "whole", False),
    ],
    "nemotron_h": [
        (f"{_N}.3.up_proj.weight", None, False, 0, "whole", False),
        (f"{_N}.3.down_proj.weight", None, False, 1, "whole", False),
    ],
    "granitemoe": [
        (f"{_W}.3.input_linear.weight", f"{_W}.input_linear.weight", True, 0, "whole", False),
        (f"{_W}.3.output_linear.weight", f"{_W}.output_linear.weight", True, 1, "whole", False),
    ],
    "gpt_oss": [
        (f"{_S}.3.{name}", f"{_S}.{name}", True, projection, "whole", False)
        for projection, name in enumerate(("gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias"))
    ],
    "inkling2": [
        (f"{_K}.3.w13_weight", f"{_K}.w13_weight", True, 0, "in turn", False),
        (f"{_K}.3.w2_weight", f"{_K}.w2_weight", True, 1, "whole", False),
    ],
    "qwen3_vl_moe": [
        (f"{_V}.3.gate_up_proj", f"{_V}.gate_up_proj", True, 0, "whole", True),
        (f"{_V}.3.down_proj", f"{_V}.down_proj", True, 1, "whole", True),
    ],
}


def built(family: str):
    return multimodal.tiny() if family == "qwen3_vl_moe" else zoo.tiny(family)


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("family", FORMS)
def test_every_expert_is_found_in_the_checkpoint(family: str, swapped: bool):
    model = built(family)
    layers = moe_layers(model)
    if swapped:
        families.swapped(model, ExpertSelection({1: [3]}))
    tensors = expert_tensors(model)
    found = {(t.name, t.stored_name, t.stacked, t.projection, t.part, t.transposed) for t in tensors
             if (t.layer, t.expert) == (1, 3)}  # fmt: skip
    expected = {(form[0], form[1] or form[0], *form[2:]) for form in FORMS[family]}
    assert found == expected
    assert len(tensors) == len({t.name for t in tensors}) == 8 * len(expected) * len(layers)
    assert {(t.layer, t.expert) for t in tensors} == {(layer.index, e) for layer in layers for e in range(8)}
    assert all(type(t.expert) is int and type(t.layer) is int for t in tensors)
    assert expert_tensors(model) is tensors  # found once


@pytest.mark.parametrize("family", FORMS)
def test_what_is_read_of_the_weights_is_what_transformers_writes(family: str):
    model = built(family)
    written = revert_weight_conversion(model, copy.copy(model.state_dict()))
    weights = {layer.index: expert_weights(model, layer, range(8)) for layer in moe_layers(model)}
    for tensor in expert_tensors(model):
        expected = written[tensor.stored_name]
        expected = expected[tensor.expert] if tensor.stacked else expected
        if family == "qwen3_vl_moe":  # transformers keeps the model's own form; the hub's files are the original
            expected = expected.mT
        assert torch.equal(tensor.read(weights[tensor.layer][tensor.expert][tensor.projection][0]), expected)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_weights_are_detached_views_in_the_order_of_the_projections_with_their_stock_names(family: str):
    model = zoo.tiny(family)
    layer = moe_layers(model)[1]
    names = ["gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias"][: 4 if family == "gpt_oss" else 2]
    expected = {name: getattr(layer.experts, name).detach().clone() for name in names}
    for swapped in (False, True):
        if swapped:
            esft.swap(model, ExpertSelection({1: [5]}))
            layer = moe_layers(model)[1]
        found = expert_weights(model, layer, (5, 2))
        assert list(found) == [5, 2]
        for expert, weights in found.items():
            assert [(name, e) for _, name, e in weights] == [(f"{layer.name}.{name}", expert) for name in names]
            for (weight, _, _), name in zip(weights, names, strict=True):
                assert torch.equal(weight, expected[name][expert]) and not weight.requires_grad
                weight += 1  # reaches the model
                expected[name][expert] += 1
    stock = esft.unswap(model).state_dict()
    assert all(torch.equal(stock[f"{layer.name}.{name}"], expected[name]) for name in names)


def test_experts_in_a_module_list_have_the_models_own_names():
    model = listed(tiny_model())
    name = "model.layers.2.mlp.experts.7"
    found = [t for t in expert_tensors(model) if t.layer == 2 and t.expert == 7]
    parts = ["gate_proj", "up_proj", "down_proj"]
    assert found == [
        ExpertTensor(2, 7, f"{name}.{part}.weight", f"{name}.{part}.weight", False, place, "whole", False)
        for place, part in enumerate(parts)
    ]
    assert len(expert_tensors(model)) == 2 * 8 * 3
    layer = moe_layers(model)[1]
    weights = expert_weights(model, layer, [7])
    assert list(weights) == [7]
    for (weight, own, index), part in zip(weights[7], parts, strict=True):
        parameter = model.get_parameter(f"{name}.{part}.weight")
        assert (own, index) == (f"{name}.{part}.weight", None)
        assert weight.data_ptr() == parameter.data_ptr() and not weight.requires_grad


def test_the_stock_modules_names_are_known_of_swapped_layers_and_not_of_ones_swapped_by_hand():
    model = zoo.tiny("nemotron_h")
    expected = (("up_proj", "down_proj"), False)
    assert stock_names(model, moe_layers(model)[0]) == expected
    esft.swap(model, ExpertSelection({}))
    assert stock_names(model, moe_layers(model)[0]) == expected
    model_state(model).swapped = None
    with pytest.raises(esft.InputError, match="^model.layers.3.mixer.experts: swapped by hand"):
        stock_names(model, moe_layers(model)[1])
    assert stock_names(zoo.tiny("gpt_oss"), moe_layers(zoo.tiny("gpt_oss"))[0])[1] is True


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
    def convert(model, state):
        return {name: mixed(tensor) for name, tensor in state.items()}

    monkeypatch.setattr("esft.checkpoint.expert_tensors.to_stored", convert)
    with pytest.raises(
        esft.InputError, match="0.mlp.experts.gate_up_proj: the checkpoint stores experts in a way that"
    ):
        expert_tensors(zoo.tiny("mixtral"))


@pytest.mark.parametrize(("family", "transposed"), [("mixtral", False), ("gpt_oss", True)])
@pytest.mark.parametrize(("part", "rows"), PARTS.items())
def test_which_rows_the_files_hold_is_told_from_where_the_numbers_come_out(
    monkeypatch, part: str, rows: list[int], family: str, transposed: bool
):
    def convert(model, state):  # a probe has two gates before two ups, in the model as its rows or its columns
        gate_up = {name: tensor for name, tensor in state.items() if name.endswith("gate_up_proj")}
        return state | {name: (tensor.mT if transposed else tensor)[:, rows] for name, tensor in gate_up.items()}

    monkeypatch.setattr("esft.checkpoint.expert_tensors.to_stored", convert)
    found = [t for t in expert_tensors(zoo.tiny(family)) if t.stored_name.endswith("gate_up_proj")]
    assert {(t.part, t.transposed, t.stacked) for t in found} == {(part, transposed, True)}
    assert len(found) == 16


@pytest.mark.parametrize(
    ("family", "ending", "mixed"),
    [("mixtral", "down_proj", lambda x: x[:, : x.shape[1] // 2]), ("gpt_oss", "down_proj_bias", lambda x: x.flip(1))],
    ids=["half of what has no halves", "a bias from its end"],
)
def test_what_no_layout_has_is_refused_with_the_tensors_name(monkeypatch, family: str, ending: str, mixed):
    def convert(model, state):
        return {name: mixed(tensor) if name.endswith(ending) else tensor for name, tensor in state.items()}

    monkeypatch.setattr("esft.checkpoint.expert_tensors.to_stored", convert)
    with pytest.raises(esft.InputError, match=f"0.mlp.experts.{ending}: the checkpoint stores experts in a way that"):
        expert_tensors(zoo.tiny(family))


def test_a_single_expert_is_stacked_like_several():
    model = zoo.tiny("gpt_oss", num_experts=1, num_local_experts=1, num_experts_per_tok=1)
    assert {(t.expert, t.stacked, t.part) for t in expert_tensors(model)} == {(0, True, "whole")}


def test_layers_that_share_a_number_are_numbered_by_their_place():
    layers = moe_layers(zoo.tiny("ernie4_5_vl_moe"))
    assert [layer.index for layer in layers] == [0, 1, 2, 3]
    assert [layer.name.split(".")[3] for layer in layers] == ["text_moe", "vision_moe"] * 2

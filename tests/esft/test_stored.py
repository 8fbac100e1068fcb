import pytest
import torch
from esft.families import moe_layers
from esft.stored import ExpertTensor, expert_tensors, slice_name

import esft
from tests.esft import zoo

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


@pytest.mark.parametrize(
    ("stacked", "expected"),
    [
        ("model.layers.3.mlp.experts.gate_up_proj", "model.layers.3.mlp.experts.17.gate_up_proj"),
        ("model.layers.3.mlp.experts.fc1.weight", "model.layers.3.mlp.experts.17.fc1.weight"),
        ("layers.3.block_sparse_moe.input_linear.weight", "layers.3.block_sparse_moe.17.input_linear.weight"),
    ],
)
def test_a_slices_name_has_the_number_where_one_by_one_names_have_it(stacked: str, expected: str):
    assert slice_name(stacked, 17) == expected


def test_a_checkpoint_in_which_experts_have_no_slice_of_their_own_is_refused(monkeypatch):
    def mixed(model, state):  # expert by expert along the second dimension
        return {name: tensor.transpose(0, 1) for name, tensor in state.items()}

    monkeypatch.setattr("esft.stored.to_stored", mixed)
    with pytest.raises(esft.InputError, match="stores experts in a way that is not supported"):
        expert_tensors(zoo.tiny("mixtral"))


def test_layers_that_share_a_number_are_numbered_by_their_place():
    layers = moe_layers(zoo.tiny("ernie4_5_vl_moe"))
    assert [layer.index for layer in layers] == [0, 1, 2, 3]
    assert [layer.name.split(".")[3] for layer in layers] == ["text_moe", "vision_moe"] * 2

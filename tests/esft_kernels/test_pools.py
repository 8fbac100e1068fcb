import pytest
import torch

from esft_kernels.activation import SWIGLU, Activation
from esft_kernels.pools import ExpertPools, ExpertWeights, split_pools
from tests.esft_kernels.layers import numbered_weights

D, F = 3, 5


def test_tensors_come_in_the_order_of_the_arguments():
    pool = numbered_weights(2, 0)
    assert [None if t is None else tuple(t.shape) for t in pool.tensors()] == [(2, 10, 3), (2, 3, 5), (2, 10), (2, 3)]
    assert numbered_weights(2, 0, biased=False).tensors()[2:] == (None, None)


@pytest.mark.parametrize(("trained", "frozen"), [(2, 4), (0, 3), (3, 0)])
def test_sizes_are_those_of_the_tensors(trained, frozen):
    pools = ExpertPools(numbered_weights(trained, 0), numbered_weights(frozen, trained))
    assert (pools.num_trained, pools.num_experts) == (trained, trained + frozen)
    assert (pools.hidden_size, pools.intermediate_size, pools.gate_up_size) == (D, F, 2 * F)


def test_experts_without_a_gate_have_one_column_of_h_for_each_of_a():
    pools = ExpertPools(numbered_weights(1, 0, F), numbered_weights(1, 1, F), Activation("relu2", gated=False))
    assert (pools.intermediate_size, pools.gate_up_size) == (F, F)


def test_pools_are_plain_swiglu_unless_told_otherwise():
    pools = ExpertPools(numbered_weights(1, 0), numbered_weights(1, 1))
    assert pools.activation == SWIGLU and pools.interleaved is False


@pytest.mark.parametrize("trained", [0, 2, 5])
@pytest.mark.parametrize("biased", [False, True])
def test_an_expert_is_found_by_its_position(trained, biased):
    pool, rest = numbered_weights(trained, 0, biased=biased), numbered_weights(5 - trained, trained, biased=biased)
    pools = ExpertPools(pool, rest)
    for position in range(5):
        expert = pools.at(position).tensors()
        shapes = [(2 * F, D), (D, F), (2 * F,), (D,)]
        for number, (tensor, shape) in enumerate(zip(expert, shapes, strict=True)):
            if number >= 2 and not biased:
                assert tensor is None
            else:
                assert tensor is not None
                assert torch.equal(tensor, torch.full(shape, 10.0 * position + number))


def test_an_expert_is_a_view_of_its_pool():
    trained, frozen = (ExpertWeights(torch.zeros(2, 2 * F, D), torch.zeros(2, D, F)) for _ in range(2))
    pools = ExpertPools(trained, frozen)
    pools.at(1).gate_up_EGD.fill_(1)
    pools.at(2).down_EDF.fill_(1)
    assert trained.gate_up_EGD.sum(dim=(1, 2)).tolist() == [0, 2 * F * D]
    assert frozen.down_EDF.sum(dim=(1, 2)).tolist() == [D * F, 0]


def pools_like(activation: Activation, interleaved: bool = False) -> ExpertPools:
    columns = F * activation.width
    return ExpertPools(numbered_weights(1, 0, columns), numbered_weights(1, 1, columns), activation, interleaved)


def test_gates_come_before_ups_or_in_turn_with_them():
    h = torch.arange(8).view(2, 4)
    gate, up = pools_like(SWIGLU).split(h)
    assert up is not None and (gate.tolist(), up.tolist()) == ([[0, 1], [4, 5]], [[2, 3], [6, 7]])
    gate, up = pools_like(SWIGLU, interleaved=True).split(h)
    assert up is not None and (gate.tolist(), up.tolist()) == ([[0, 2], [4, 6]], [[1, 3], [5, 7]])
    gate.fill_(-1)
    assert h.tolist() == [[-1, 1, -1, 3], [-1, 5, -1, 7]]  # views


@pytest.mark.parametrize("shape", [(4,), (2, 4), (3, 2, 4)], ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
def test_the_columns_are_split_however_many_dimensions_come_before(interleaved, shape):
    h = torch.arange(4).expand(shape)
    gate, up = pools_like(SWIGLU, interleaved).split(h)
    columns = [[0, 2], [1, 3]] if interleaved else [[0, 1], [2, 3]]
    for part, expected in zip((gate, up), columns, strict=True):
        assert part is not None and torch.equal(part, torch.tensor(expected).expand(*shape[:-1], 2))


@pytest.mark.parametrize("interleaved", [False, True])
def test_without_a_gate_nothing_is_split(interleaved):
    h = torch.randn(2, 4)
    all_of_it, up = pools_like(Activation("gelu", gated=False), interleaved).split(h)
    assert all_of_it is h and up is None


@pytest.mark.parametrize("trained", [[], [4, 1], [0, 1, 2, 3, 4]])
@pytest.mark.parametrize("biased", [False, True])
def test_stacked_weights_are_split_into_pools_with_copies_in_their_order(trained: list[int], biased: bool):
    biases = (torch.randn(5, 8), torch.randn(5, 3)) if biased else (None, None)
    weights = ExpertWeights(torch.randn(5, 8, 3), torch.randn(5, 3, 4), *biases)
    activation = Activation("gelu")
    pools = split_pools(weights, trained, activation, interleaved=True)
    assert (pools.activation, pools.interleaved) == (activation, True)
    frozen = [expert for expert in range(5) if expert not in trained]
    for pool, ids in ((pools.trained, trained), (pools.frozen, frozen)):
        for part, whole in zip(pool.tensors(), weights.tensors(), strict=True):
            assert (part is None) == (whole is None)
            if part is not None and whole is not None:
                assert torch.equal(part, whole[ids]) and part.data_ptr() != whole.data_ptr()
    assert split_pools(weights, [2]).activation == SWIGLU and not split_pools(weights, [2]).interleaved
    with pytest.raises(ValueError, match=r"trained experts \[5\] are not in a layer of 5"):
        split_pools(weights, [5])

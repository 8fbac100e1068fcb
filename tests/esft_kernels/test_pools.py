from collections.abc import Sequence

import pytest
import torch

from esft_kernels.activation import SWIGLU, Activation
from esft_kernels.formats.resolve import FORMATS
from esft_kernels.pools import (
    PLAIN,
    ExpertPools,
    ExpertWeights,
    QuantizedWeights,
    dequantize,
    pools_of,
    quantize,
    split_pools,
)
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


@pytest.mark.parametrize("trained", [[], [4, 1], (0, 1, 2, 3, 4)])
@pytest.mark.parametrize("biased", [False, True])
def test_stacked_weights_are_split_into_pools_with_copies_in_their_order(trained: Sequence[int], biased: bool):
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
                assert torch.equal(part, whole[list(ids)]) and part.data_ptr() != whole.data_ptr()
    assert split_pools(weights, [2]).activation == SWIGLU and not split_pools(weights, [2]).interleaved
    with pytest.raises(ValueError, match=r"trained experts \[5\] are not in a layer of 5"):
        split_pools(weights, [5])


@pytest.mark.parametrize("trained", [[], [1], [0, 1, 2]])
@pytest.mark.parametrize("device", ["cpu", "meta"])  # which lay out what they take from a transposed stack in two ways
def test_pools_lie_in_memory_as_the_stack_does(trained, device):
    transposed = ExpertWeights(torch.randn(3, D, 2 * F, device=device).mT, torch.randn(3, F, D, device=device).mT)
    for weights in (transposed, ExpertWeights(transposed.gate_up_EGD.contiguous(), transposed.down_EDF.contiguous())):
        pools = split_pools(weights, trained)
        for pool in (pools.trained, pools.frozen):
            assert isinstance(pool, ExpertWeights)
            assert pool.gate_up_EGD.stride() == weights.gate_up_EGD.stride()
            assert pool.down_EDF.stride() == weights.down_EDF.stride()


def random_weights(experts: int, biased: bool = True) -> ExpertWeights:
    biases = (torch.randn(experts, 2 * F), torch.randn(experts, D)) if biased else ()
    return ExpertWeights(torch.randn(experts, 2 * F, D), torch.randn(experts, D, F), *biases)


@pytest.mark.parametrize("name", FORMATS)
def test_a_quantized_pool_answers_what_a_plain_one_does(name):
    trained, plain = random_weights(2), random_weights(3)
    quantized = quantize(plain, name)
    quantized.check()
    assert (quantized.format, quantized.shape, quantized.num_experts) == (name, (2 * F, D, F), 3)
    assert quantized.gate_up_bias_EG is plain.gate_up_bias_EG and quantized.down_bias_ED is plain.down_bias_ED
    pools, written = ExpertPools(trained, quantized), dequantize(quantized, torch.float32)
    assert (pools.num_experts, pools.hidden_size, pools.intermediate_size) == (5, D, F)
    assert pools.format == name and ExpertPools(trained, plain).format == PLAIN
    for position in range(5):
        expected = ExpertPools(trained, written).at(position).tensors()
        for tensor, other in zip(pools.at(position).tensors(), expected, strict=True):
            assert tensor is not None and other is not None and torch.equal(tensor, other)
    for projection, whole in (("gate_up", plain.gate_up_EGD), ("down", plain.down_EDF)):
        for index in range(3):
            matrix = quantized.matrix(projection, index, quantized.buffer(torch.float32))
            assert matrix.shape == whole[index].shape == plain.matrix(projection, index).shape
            assert (matrix - whole[index]).abs().max() < 0.5  # of this expert, and not another


@pytest.mark.parametrize("name", [PLAIN, *FORMATS])
@pytest.mark.parametrize("biased", [False, True])
def test_pools_are_made_again_from_their_tensors(name, biased):
    frozen = random_weights(3, biased)
    activation = Activation("gelu")
    made = frozen if name == PLAIN else quantize(frozen, name)
    pools = ExpertPools(random_weights(2, biased), made, activation, True)
    again = pools_of(list(pools.tensors()), activation, True, pools.format)
    assert type(again.frozen) is type(pools.frozen) and (again.activation, again.interleaved) == (activation, True)
    for tensor, other in zip(again.tensors(), pools.tensors(), strict=True):
        assert tensor is other
    if isinstance(again.frozen, QuantizedWeights) and isinstance(made, QuantizedWeights):
        assert (again.frozen.shape, again.frozen.gate_up, again.frozen.down) == (made.shape, made.gate_up, made.down)


def test_one_buffer_is_large_enough_for_both_matrices():
    for d, f in ((8, 70), (70, 8)):
        pool = quantize(ExpertWeights(torch.randn(1, 2 * f, d), torch.randn(1, d, f)), "int8")
        buffer = pool.buffer(torch.bfloat16)
        assert buffer.dtype == torch.bfloat16
        assert buffer.numel() == max(2 * f * (64 if d == 8 else 128), d * (64 if f == 8 else 128))
        assert pool.matrix("gate_up", 0, buffer).data_ptr() == pool.matrix("down", 0, buffer).data_ptr()


def test_a_pool_is_checked_as_a_whole():
    pool = quantize(random_weights(3), "fp8")
    pool.down[1][2] = float("nan")
    with pytest.raises(ValueError, match="^down: a scale of fp8 is not finite$"):
        pool.check()
    with pytest.raises(ValueError, match="^gate_up weight of fp8 must be"):
        QuantizedWeights("fp8", (2 * F + 1, D, F), pool.gate_up, pool.down).check()
    with pytest.raises(ValueError, match="^format must be one of"):
        quantize(random_weights(1), "bf16")

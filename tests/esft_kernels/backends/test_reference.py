"""The reference against autograd through the definition, in float64: everything else is tested against it."""

from dataclasses import replace

import pytest
import torch

from esft_kernels.backend import Needs
from esft_kernels.backends import reference
from esft_kernels.pools import ExpertWeights
from esft_kernels.routing import route
from tests.esft_kernels.layers import ACTIVATIONS, GPT_OSS, TOLERANCE, assert_close, make_layer, naive_moe

SMALL = {"tokens": 9, "hidden": 12, "intermediate": 10}
CASES = {
    "mixed": {},
    "no rows on trained 1 and frozen 0": {"used": (2, 3, 4, 5)},
    "one expert": {"top_k": 1, "used": (4,)},
    "none trained": {"trained": ()},
    "all trained": {"trained": (5, 0, 3, 1, 2, 4)},
    "no token": {"tokens": 0},
    "one token": {"tokens": 1},
    "biases": {"biased": True},
    "experts elsewhere": {"elsewhere": True, "biased": True},
    "interleaved": {"interleaved": True},
    "interleaved and transposed, with biases, as in gpt-oss": {
        "interleaved": True,
        "transposed": True,
        "biased": True,
        "activation": GPT_OSS,
    },
    **{name: {"activation": activation} for name, activation in ACTIVATIONS.items()},
}


@pytest.mark.parametrize(
    "needs", [Needs(True, True, True), Needs(False, False, True), Needs(True, False, False), Needs(False, True, False)]
)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_forward_and_backward_match_autograd(case, needs):
    layer = make_layer(**{**SMALL, **case})
    inputs = (layer.x_TD, layer.weights_TK, layer.gate_up_EGD, layer.down_EDF)
    biases = [t for t in (layer.gate_up_bias_EG, layer.down_bias_ED) if t is not None]
    leaves = [t.clone().requires_grad_() for t in (*inputs, *biases)]
    expected = naive_moe(layer, *leaves)
    grads = torch.autograd.grad(expected, leaves, layer.grad_out_TD, materialize_grads=True)
    trained = torch.tensor(layer.trained, dtype=torch.int64)

    routing, pools, tolerance = layer.routing, layer.pools, TOLERANCE[torch.float64]
    out, h = reference.forward(layer.x_TD, layer.weights_TK, pools, routing, routing.num_rows)
    prefix = h[: routing.prefix_rows()]
    assert_close(reference.rebuild(layer.x_TD, prefix, pools, routing), h, tolerance)
    if not needs.all_rows:  # as the autograd function keeps it
        h = prefix
    actual = reference.backward(layer.grad_out_TD, layer.x_TD, h, layer.weights_TK, pools, routing, needs)
    assert_close(out, expected.detach(), tolerance)
    assert_close(actual.x_TD, grads[0] if needs.x else None, tolerance)
    assert_close(actual.weights_TK, grads[1] if needs.weights else None, tolerance)
    assert (actual.trained is not None) == needs.trained
    if actual.trained is not None:
        found = [t for t in actual.trained.tensors() if t is not None]
        for grad, expected_grad in zip(found, grads[2:], strict=True):
            assert_close(grad, expected_grad[trained], tolerance)


# Three rows on position 0, none on 1, one on 2, and one of no expert.
OFFSETS = [0, 3, 3, 4]
ROWS = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [2.0, 0.0], [5.0, 5.0]])
WEIGHTS = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], [[9.0, 9.0]] * 3, [[1.0, 0.0], [2.0, 0.0], [3.0, 0.0]]])


def test_every_row_is_multiplied_by_the_weight_of_its_expert():
    out = reference.grouped_gemm(ROWS, lambda e: WEIGHTS[e], OFFSETS, 3)
    assert out.tolist() == [[1, 3, 5], [2, 4, 6], [3, 7, 11], [2, 4, 6], [0, 0, 0]]
    bias = torch.tensor([[10.0, 20.0, 30.0], [7.0, 7.0, 7.0], [100.0, 200.0, 300.0]])
    out = reference.grouped_gemm(ROWS, lambda e: WEIGHTS[e], OFFSETS, 3, lambda e: bias[e])
    assert out.tolist() == [[11, 23, 35], [12, 24, 36], [13, 27, 41], [102, 204, 306], [0, 0, 0]]
    assert reference.grouped_gemm(ROWS.double(), lambda e: WEIGHTS[e].double(), OFFSETS, 3).dtype == torch.float64
    assert torch.equal(
        reference.grouped_gemm(ROWS, lambda e: WEIGHTS[e], OFFSETS, 3, lambda e: None),
        reference.grouped_gemm(ROWS, lambda e: WEIGHTS[e], OFFSETS, 3),
    )


@pytest.mark.parametrize("trained", [0, 1, 2, 3])
def test_a_weight_gradient_is_a_sum_over_the_rows_of_a_trained_expert(trained):
    grad_rows = torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, 0.0], [0.0, 3.0, 0.0], [1.0, 2.0, 3.0], [9.0, 9.0, 9.0]])
    expected = [[[1, 0], [3, 4], [2, 0]], [[0, 0]] * 3, [[2, 0], [4, 0], [6, 0]]][:trained]
    found = reference.grouped_wgrad(grad_rows, ROWS, OFFSETS, trained)
    assert found.shape == (trained, 3, 2) and found.tolist() == expected
    sums = reference.bias_grad(grad_rows.bfloat16(), OFFSETS, trained)
    assert sums.tolist() == [[1, 4, 2], [0, 0, 0], [1, 2, 3]][:trained]
    assert sums.shape == (trained, 3) and sums.dtype == torch.bfloat16


def test_combining_adds_the_slots_of_a_token():
    assert reference.combine(torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [7.0, 8.0]]])).tolist() == [
        [4, 6],
        [12, 14],
    ]


def test_every_row_has_its_slots_routing_weight():
    routing = route(torch.tensor([[0, 2], [2, 1], [0, 1]]), torch.tensor([1, 2, 0]), num_trained=1)
    weights = torch.tensor([[0.25, 0.5], [1.0, 2.0], [4.0, 8.0]])
    rows = reference.row_weights(weights, routing, torch.bfloat16)
    assert rows.dtype == torch.bfloat16
    assert rows.tolist() == [[0.5], [1], [0.25], [4], [2], [8]]  # expert 2's first, then those of 0, then of 1


@pytest.mark.parametrize("keep", ["none", "prefix", "all"])
def test_the_first_rows_of_h_are_kept_and_no_memory_besides(keep):
    layer = make_layer(tokens=6)
    routing, pools = layer.routing, layer.pools
    rows = {"none": 0, "prefix": routing.prefix_rows(), "all": routing.num_rows}[keep]
    _, h = reference.forward(layer.x_TD, layer.weights_TK, pools, routing, rows)
    x_ND = layer.x_TD[routing.token_N]
    expected = [x_ND[:0, :1].expand(0, pools.gate_up_size)]
    for e, (start, end) in enumerate(zip(routing.offsets_E1, routing.offsets_E1[1:], strict=False)):
        expected.append(x_ND[start:end] @ pools.at(e).gate_up_EGD.T)
    assert_close(h, torch.cat(expected)[:rows], TOLERANCE[torch.float64])
    assert h.untyped_storage().nbytes() == 8 * h.numel()


def test_a_rebuilt_h_holds_the_kept_rows_as_they_are():
    layer = make_layer(tokens=6)
    routing, pools = layer.routing, layer.pools
    _, h = reference.forward(layer.x_TD, layer.weights_TK, pools, routing, routing.num_rows)
    prefix = torch.full_like(h[: routing.prefix_rows()], 7.0)
    assert 0 < len(prefix) < len(h)
    rebuilt = reference.rebuild(layer.x_TD, prefix, pools, routing)
    assert torch.equal(rebuilt, torch.cat([prefix, h[len(prefix) :]]))


def test_gradients_are_in_the_dtypes_of_what_they_are_of():
    layer = make_layer(tokens=4, dtype=torch.bfloat16, biased=True)
    pools, routing = layer.pools, layer.routing
    out, h = reference.forward(layer.x_TD, layer.weights_TK, pools, routing, routing.num_rows)
    needs = Needs(x=True, weights=True, trained=True)
    grads = reference.backward(layer.grad_out_TD, layer.x_TD, h, layer.weights_TK, pools, routing, needs)
    assert layer.weights_TK.dtype == torch.float32
    assert grads.weights_TK.dtype == torch.float32
    assert {t.dtype for t in (out, h, grads.x_TD, *grads.trained.tensors())} == {torch.bfloat16}


def test_with_only_the_trained_pool_to_train_nothing_of_the_frozen_one_is_read():
    layer = make_layer(biased=True, elsewhere=True)
    pools, routing, needs = layer.pools, layer.routing, Needs(x=False, weights=False, trained=True)
    _, h = reference.forward(layer.x_TD, layer.weights_TK, pools, routing, routing.num_rows)
    expected = reference.backward(layer.grad_out_TD, layer.x_TD, h, layer.weights_TK, pools, routing, needs)
    h[routing.prefix_rows() :] = float("nan")
    spoilt = replace(pools, frozen=ExpertWeights(*(torch.full_like(t, float("nan")) for t in pools.frozen.tensors())))
    found = reference.backward(layer.grad_out_TD, layer.x_TD, h, layer.weights_TK, spoilt, routing, needs)
    for mine, theirs in zip(found.trained.tensors(), expected.trained.tensors(), strict=True):
        assert torch.equal(mine, theirs)


def test_rows_of_no_expert_get_no_gradient():
    layer = make_layer(tokens=6, elsewhere=True, biased=True)
    pools, routing = layer.pools, layer.routing
    _, h = reference.forward(layer.x_TD, layer.weights_TK, pools, routing, routing.num_rows)
    h[routing.offsets_E1[-1] :] = float("nan")
    needs = Needs(x=True, weights=True, trained=False)
    grads = reference.backward(layer.grad_out_TD, layer.x_TD, h, layer.weights_TK, pools, routing, needs)
    assert grads.trained is None and not grads.x_TD.isnan().any()
    assert torch.equal(grads.weights_TK == 0, layer.ids_TK == 6)


@pytest.mark.parametrize("keep", ["none", "prefix", "all"])
def test_what_is_kept_for_the_backward_holds_no_more_in_memory(keep: str):
    layer = make_layer(**SMALL)
    rows = {"none": 0, "prefix": layer.routing.prefix_rows(), "all": layer.routing.num_rows}[keep]
    _, h = reference.forward(layer.x_TD, layer.weights_TK, layer.pools, layer.routing, rows)
    assert len(h) == rows and h.untyped_storage().nbytes() == h.nbytes

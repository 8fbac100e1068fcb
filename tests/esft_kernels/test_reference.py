"""The reference against autograd through the definition, in float64: everything else is tested against it."""

import pytest
import torch

from esft_kernels import reference
from esft_kernels.pools import Needs
from tests.esft_kernels.layers import TOLERANCE, assert_close, make_layer, naive_moe

CASES = {
    "mixed": {},
    "no rows on trained 1 and frozen 0": {"used": (2, 3, 4, 5)},
    "one expert": {"top_k": 1, "used": (4,)},
    "none trained": {"trained": ()},
    "all trained": {"trained": (5, 0, 3, 1, 2, 4)},
    "no token": {"tokens": 0},
    "one token": {"tokens": 1},
}


@pytest.mark.parametrize("needs", [Needs(True, True, True), Needs(False, False, True), Needs(True, False, False)])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_forward_and_backward_match_autograd(case, needs):
    layer = make_layer(**case)
    inputs = (layer.x_TD, layer.weights_TK, layer.gate_up_EGD, layer.down_EDF)
    x, weights, gate_up, down = leaves = [t.clone().requires_grad_() for t in inputs]
    expected = naive_moe(x, layer.ids_TK, weights, gate_up, down)
    grads = torch.autograd.grad(expected, leaves, layer.grad_out_TD, materialize_grads=True)
    trained = torch.tensor(layer.trained, dtype=torch.int64)
    expected_grads = [
        grads[0] if needs.x else None,
        grads[1] if needs.weights else None,
        grads[2][trained] if needs.trained else None,
        grads[3][trained] if needs.trained else None,
    ]

    routing, pools, tolerance = layer.routing, layer.pools, TOLERANCE[torch.float64]
    out, h = reference.forward(layer.x_TD, layer.weights_TK, pools, routing)
    if not needs.all_rows:  # as the autograd function keeps it
        h = h[: routing.prefix_rows()]
    actual = reference.backward(layer.grad_out_TD, layer.x_TD, h, layer.weights_TK, pools, routing, needs)
    assert_close(out, expected.detach(), tolerance)
    for grad, expected_grad in zip(vars(actual).values(), expected_grads, strict=True):
        assert_close(grad, expected_grad, tolerance)


def test_swiglu_backward_matches_autograd():
    h = torch.randn(5, 14, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(5, 7, dtype=torch.float64)
    (expected,) = torch.autograd.grad(reference.swiglu(h), h, grad)
    assert_close(reference.swiglu_backward(grad, h.detach()), expected, 1e-12)

"""The reference against autograd through the definition, in float64: everything else is tested against it."""

import pytest
import torch

from esft_kernels import reference
from esft_kernels.pools import Needs
from tests.esft_kernels.layers import ACTIVATIONS, GPT_OSS, TOLERANCE, assert_close, make_layer, naive_moe

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


@pytest.mark.parametrize("needs", [Needs(True, True, True), Needs(False, False, True), Needs(True, False, False)])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_forward_and_backward_match_autograd(case, needs):
    layer = make_layer(**case)
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

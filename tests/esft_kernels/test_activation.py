import pytest
import torch

from esft_kernels.activation import Activation
from tests.esft_kernels.layers import ACTIVATIONS, assert_close, naive_activation


@pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_matches_autograd_through_the_definition(activation):
    h = torch.randn(9 * activation.width, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(9, dtype=torch.float64)
    expected = naive_activation(activation, h, interleaved=False)
    (expected_grad,) = torch.autograd.grad(expected, h, grad)
    gate, up = h.detach().chunk(2) if activation.gated else (h.detach(), None)
    assert_close(activation.forward(gate, up), expected.detach(), 1e-12)
    grads = [g for g in activation.backward(grad, gate, up) if g is not None]
    assert_close(torch.cat(grads), expected_grad, 1e-12)

    a, grad_gate = torch.empty_like(gate), torch.empty_like(gate)
    grad_up = torch.empty_like(gate) if activation.gated else None
    activation.forward_into(a, gate, up)
    activation.backward_into(grad_gate, grad_up, grad.clone(), gate, up)
    assert_close(a, expected.detach(), 1e-12)
    assert_close(torch.cat([g for g in (grad_gate, grad_up) if g is not None]), expected_grad, 1e-12)


def test_a_clamped_value_gets_no_gradient_and_one_at_the_limit_does():
    grad_gate, grad_up = Activation(limit=1.0).backward(
        torch.ones(3), torch.tensor([0.5, 1.0, 1.5]), torch.tensor([-1.5, -1.0, 2.0])
    )
    assert grad_up is not None
    assert (grad_gate != 0).tolist() == [True, True, False]
    assert (grad_up != 0).tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "swish"}, "must be one of silu, gelu, gelu_tanh, relu2, got 'swish'"),
        ({"kind": "gelu", "slope": 1.7}, "only silu has a slope"),
        ({"gated": False, "limit": 7.0}, "belong to gated experts"),
        ({"limit": 0.0}, "must be positive"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Activation(**settings)

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from esft_kernels.activation import SWIGLU, Activation
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


@pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_without_an_up_projection_there_is_the_gate_alone(activation):
    z = torch.randn(9, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(9, dtype=torch.float64)
    expected = naive_activation(dataclasses.replace(activation, gated=False, limit=None, up_offset=0.0), z, False)
    (expected_grad,) = torch.autograd.grad(expected, z, grad)
    z = z.detach()
    assert_close(activation.forward(z, None), expected.detach(), 1e-12)
    grad_z, grad_up = activation.backward(grad, z, None)
    assert_close(grad_z, expected_grad, 1e-12)
    assert grad_up is None
    a, grad_gate = torch.empty_like(z), torch.empty_like(z)
    activation.forward_into(a, z, None)
    activation.backward_into(grad_gate, None, grad.clone(), z, None)
    assert_close(a, expected.detach(), 1e-12)
    assert_close(grad_gate, expected_grad, 1e-12)


def test_the_gradient_of_the_gate_can_be_had_alone():
    gate, up, grad = torch.randn(3, 9, dtype=torch.float64)
    alone = torch.empty_like(gate)
    SWIGLU.backward_into(alone, None, grad.clone(), gate, up)
    assert_close(alone, SWIGLU.backward(grad, gate, up)[0], 1e-12)


@pytest.mark.parametrize("function", ["forward", "backward"])
def test_an_activation_leaves_its_inputs_alone(function):
    for activation in ACTIVATIONS.values():
        given = list(torch.randn(3, 9))[: 3 if activation.gated else 2]
        grad, gate, up = (*given, None)[:3]
        before = [t.clone() for t in given]
        activation.forward(gate, up) if function == "forward" else activation.backward(grad, gate, up)
        assert all(torch.equal(t, kept) for t, kept in zip(given, before, strict=True))


class Fresh(TorchDispatchMode):
    """Counts the operators whose result is a tensor in memory that was not there before."""

    def __init__(self, *known: Tensor):
        super().__init__()
        self.known, self.count = {t.untyped_storage().data_ptr() for t in known}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.count += out.untyped_storage().data_ptr() not in self.known
        return out


def test_plain_swiglu_takes_no_memory_besides():
    tensors = a, grad_gate, grad_up, grad_a, gate, up = [torch.randn(4, 5) for _ in range(6)]
    with Fresh(*tensors) as fresh:
        SWIGLU.forward_into(a, gate, up)
        SWIGLU.backward_into(grad_gate, grad_up, grad_a, gate, up)
    assert fresh.count == 0
    with Fresh(*tensors) as fresh:
        SWIGLU.forward(gate, up)
    assert fresh.count == 2  # the count counts: silu and the product


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_silu_of_16_bits_is_rounded_once(dtype):
    z = torch.randn(1000).to(dtype)
    assert torch.equal(Activation(gated=False).forward(z, None), F.silu(z.float()).to(dtype))


@pytest.mark.parametrize("gate", [-30.0, -1.5, 0.25, 1.0, 1.25, 30.0])
@pytest.mark.parametrize("up", [-30.0, -1.25, -1.0, 0.25, 1.0, 1.25, 30.0])
def test_a_limit_clamps_the_gate_from_above_and_up_on_both_sides(gate, up):
    out = Activation(limit=1.0, up_offset=1.0).forward(torch.tensor([gate]), torch.tensor([up]))
    clamped = torch.tensor([min(gate, 1.0)])
    assert_close(out, F.silu(clamped) * (max(min(up, 1.0), -1.0) + 1.0), 1e-6)


def test_a_clamped_value_gets_no_gradient_and_one_at_the_limit_does():
    grad_gate, grad_up = Activation(limit=1.0).backward(
        torch.ones(4), torch.tensor([0.5, 1.0, 1.5, -2.0]), torch.tensor([-1.5, -1.0, 2.0, 1.0])
    )
    assert grad_up is not None
    assert (grad_gate != 0).tolist() == [True, True, False, True]
    assert (grad_up != 0).tolist() == [False, True, False, True]


def test_the_defaults_are_plain_swiglu():
    assert Activation("silu", True, 1.0, None, 0.0) == SWIGLU == Activation()
    assert Activation("gelu", False, 1.0, None, 0.0) == Activation(kind="gelu", gated=False)


@pytest.mark.parametrize(("gated", "width"), [(True, 2), (False, 1)])
def test_h_has_two_columns_for_each_of_a_where_there_is_a_gate(gated, width):
    assert Activation(gated=gated).width == width


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "swish"}, "activation must be one of silu, gelu, gelu_tanh, relu2, got 'swish'"),
        ({"kind": "gelu", "slope": 1.7}, "only silu has a slope, got slope=1.7 with gelu"),
        ({"kind": "gelu_tanh", "slope": 0.0}, "only silu has a slope, got slope=0.0 with gelu_tanh"),
        ({"kind": "relu2", "gated": False, "slope": 2.0}, "only silu has a slope, got slope=2.0 with relu2"),
        ({"gated": False, "limit": 7.0}, "limit and up_offset belong to gated experts"),
        ({"gated": False, "up_offset": 1.0}, "limit and up_offset belong to gated experts"),
        ({"limit": 0.0}, "limit must be positive, got 0.0"),
        ({"limit": -1.0}, "limit must be positive, got -1.0"),
        ({"limit": float("nan")}, "limit must be positive, got nan"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        Activation(**settings)


@pytest.mark.parametrize(
    "settings", [{"limit": 0.5}, {"slope": 2.0, "gated": False}, {"up_offset": -1.0}, {"kind": "relu2", "gated": True}]
)
def test_settings_that_mean_something_are_kept(settings):
    activation = Activation(**settings)
    assert {name: getattr(activation, name) for name in settings} == settings


def test_an_activation_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Activation().slope = 2.0  # pyright: ignore[reportAttributeAccessIssue]

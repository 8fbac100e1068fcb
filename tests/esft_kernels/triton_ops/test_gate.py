"""The activations inside the kernels, on one tile, against autograd through their definition."""

import pytest
import torch

from esft_kernels.activation import Activation

pytest.importorskip("triton")
import triton
import triton.language as tl

from esft_kernels.triton_ops.gate import activate, activate_backward, constants
from tests.esft_kernels.layers import ACTIVATIONS, TOLERANCE, assert_close, naive_activation

M, F = 4, 8
CASES = ACTIVATIONS | {
    "clamped gelu_tanh": Activation("gelu_tanh", limit=0.5, up_offset=-2.0),
    "relu2 with a gate": Activation("relu2"),
    "plain silu with a slope": Activation(gated=False, slope=1.702),
}


@triton.jit
def _forward(
    h_ptr, a_ptr, M: tl.constexpr, F: tl.constexpr,
    KIND: tl.constexpr, GATED: tl.constexpr, SLOPE: tl.constexpr, LIMIT: tl.constexpr, UP_OFFSET: tl.constexpr,
):  # fmt: skip
    G: tl.constexpr = 2 * F if GATED else F
    m_M1, f_F, g_G = tl.arange(0, M)[:, None], tl.arange(0, F), tl.arange(0, G)
    h_MG = tl.load(h_ptr + m_M1 * G + g_G[None, :])
    tl.store(a_ptr + m_M1 * F + f_F[None, :], activate(h_MG, M, F, KIND, GATED, SLOPE, LIMIT, UP_OFFSET))


@triton.jit
def _backward(
    grad_a_ptr, weight_ptr, h_ptr, a_ptr, grad_h_ptr, M: tl.constexpr, F: tl.constexpr,
    KIND: tl.constexpr, GATED: tl.constexpr, SLOPE: tl.constexpr, LIMIT: tl.constexpr, UP_OFFSET: tl.constexpr,
):  # fmt: skip
    G: tl.constexpr = 2 * F if GATED else F
    m_M1, f_F, g_G = tl.arange(0, M)[:, None], tl.arange(0, F), tl.arange(0, G)
    a_MF, grad_h_MG = activate_backward(
        tl.load(grad_a_ptr + m_M1 * F + f_F[None, :]), tl.load(weight_ptr + m_M1),
        tl.load(h_ptr + m_M1 * G + g_G[None, :]), M, F, KIND, GATED, SLOPE, LIMIT, UP_OFFSET,
    )  # fmt: skip
    tl.store(a_ptr + m_M1 * F + f_F[None, :], a_MF)
    tl.store(grad_h_ptr + m_M1 * G + g_G[None, :], grad_h_MG)


def forward(activation: Activation, h: torch.Tensor) -> torch.Tensor:
    a = torch.empty(M, F)
    _forward[(1,)](h, a, M=M, F=F, **constants(activation))
    return a


def backward(activation, h, grad_a, weight) -> tuple[torch.Tensor, torch.Tensor]:
    a, grad_h = torch.empty(M, F), torch.empty(h.shape)
    _backward[(1,)](grad_a, weight, h, a, grad_h, M=M, F=F, **constants(activation))
    return a, grad_h


def exact(activation: Activation, h: torch.Tensor, grad_a: torch.Tensor, weight: torch.Tensor):
    """A and the gradient of H, its columns (gate, up) in turn, by autograd in float64."""
    h = h.double().requires_grad_()
    a = torch.stack([naive_activation(activation, row, interleaved=True) for row in h])
    (grad_h,) = torch.autograd.grad(a, h, grad_a.double() * weight.double()[:, None])
    return a.detach(), grad_h


# In a 16-bit dtype only the given H is coarse: all that is made of it is fp32.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", CASES.values(), ids=CASES)
def test_matches_autograd_through_the_definition(activation, dtype):
    h = (2 * torch.randn(M, F * activation.width)).to(dtype)
    grad_a, weight = torch.randn(M, F), torch.rand(M)
    exact_a, exact_grad = exact(activation, h, grad_a, weight)
    assert_close(forward(activation, h), exact_a, TOLERANCE[torch.float32])
    a, grad_h = backward(activation, h, grad_a, weight)
    assert_close(a, exact_a, TOLERANCE[torch.float32])
    assert_close(grad_h, exact_grad, TOLERANCE[torch.float32])


@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh", "relu2"])
@pytest.mark.parametrize("up_offset", [0.0, 3.0])
def test_values_at_the_limit_get_a_gradient_and_values_past_it_none(kind, up_offset):
    activation = Activation(kind, limit=1.5, up_offset=up_offset)
    gate = torch.tensor([1.5, 1.5, 1.25, 1.0, 1.75, -1.5, -4.0, 1.5])
    up = torch.tensor([1.5, -1.5, 1.75, -1.75, 1.0, 1.5, -1.5, 0.5])
    h = torch.stack([gate, up], dim=1).reshape(1, 2 * F).repeat(M, 1)
    grad_a, weight = torch.rand(M, F) + 1, torch.rand(M) + 1
    a, grad_h = backward(activation, h, grad_a, weight)
    exact_a, exact_grad = exact(activation, h, grad_a, weight)
    assert_close(a, exact_a, TOLERANCE[torch.float32])
    assert_close(grad_h, exact_grad, TOLERANCE[torch.float32])
    grad_gate, grad_up = grad_h[:, 0::2], grad_h[:, 1::2]
    assert (grad_gate[0, :4] != 0).all() and not grad_gate[:, 4].any()  # the gate has no limit below
    assert (grad_up[0, :2] != 0).all() and not grad_up[:, 2:4].any()


@pytest.mark.parametrize("activation", CASES.values(), ids=CASES)
def test_a_nan_stays_one_and_keeps_to_its_own_columns(activation):
    h = torch.rand(M, F * activation.width)
    width = activation.width
    h[1, 3 * width] = h[2, 5 * width + width - 1] = float("nan")  # a gate and an up, or two pre-activations
    a = forward(activation, h)
    again, _ = backward(activation, h, torch.ones(M, F), torch.ones(M))
    for values in (a, again):
        assert values.isnan().nonzero().tolist() == [[1, 3], [2, 5]]


@pytest.mark.filterwarnings("ignore:overflow")  # numpy's, inside the interpreter: exp overflows to inf, as it should
@pytest.mark.parametrize("activation", [a for a in CASES.values() if a.kind != "relu2"], ids=lambda a: str(a))
def test_extreme_gates_do_not_overflow(activation):
    h = torch.full((M, F * activation.width), 1e4)
    h[1] = -1e4
    grad_a, weight = torch.ones(M, F), torch.ones(M)
    exact_a, exact_grad = exact(activation, h, grad_a, weight)
    a, grad_h = backward(activation, h, grad_a, weight)
    for actual, expected in ((forward(activation, h), exact_a), (a, exact_a), (grad_h, exact_grad)):
        assert_close(actual, expected, TOLERANCE[torch.float32])


def test_a_kernel_is_told_every_setting():
    assert constants(Activation("silu", slope=1.702, limit=7.0, up_offset=1.0)) == {
        "KIND": "silu", "GATED": True, "SLOPE": 1.702, "LIMIT": 7.0, "UP_OFFSET": 1.0,
    }  # fmt: skip
    assert constants(Activation("gelu", gated=False)) == {
        "KIND": "gelu", "GATED": False, "SLOPE": 1.0, "LIMIT": None, "UP_OFFSET": 0.0,
    }  # fmt: skip

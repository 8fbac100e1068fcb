"""Triton: the activations of ``activation.py`` on tiles whose columns are (gate, up) in turn."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from esft_kernels.activation import Activation

NAN = tl.constexpr(tl.PropagateNan.ALL)  # a NaN stays one, as in torch.clamp, instead of becoming the limit


def constants(activation: Activation) -> dict[str, object]:
    """The compile-time arguments by which a kernel knows its activation."""
    return {
        "KIND": activation.kind, "GATED": activation.gated, "SLOPE": activation.slope,
        "LIMIT": activation.limit, "UP_OFFSET": activation.up_offset,
    }  # fmt: skip


@triton.jit
def _pair(h_MG, M: tl.constexpr, F: tl.constexpr):
    return tl.split(tl.reshape(h_MG, (M, F, 2)))


@triton.jit
def _value_and_slope(z, KIND: tl.constexpr, SLOPE: tl.constexpr):
    if KIND == "silu":
        sigmoid = tl.sigmoid(z * SLOPE)
        value = z * sigmoid
        slope = sigmoid + SLOPE * value * (1 - sigmoid)
    elif KIND == "relu2":
        positive = tl.maximum(z, 0.0, propagate_nan=NAN)
        value = positive * positive
        slope = 2 * positive
    elif KIND == "gelu":
        share = 0.5 + 0.5 * tl.erf(z * 0.7071067811865476)
        value = z * share
        slope = share + z * tl.exp(-0.5 * z * z) * 0.3989422804014327
    else:
        # 0.5 * (1 + tanh(u)) is sigmoid(2u), and that is in every backend.
        share = tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
        value = z * share
        slope = share + z * share * (1 - share) * 1.5957691216057308 * (1 + 0.134145 * z * z)
    return value, slope


@triton.jit
def activate(
    h_MG, M: tl.constexpr, F: tl.constexpr,
    KIND: tl.constexpr, GATED: tl.constexpr, SLOPE: tl.constexpr, LIMIT: tl.constexpr, UP_OFFSET: tl.constexpr,
):  # fmt: skip
    """A [M, F] in fp32 from H [M, 2F], or [M, F] without a gate."""
    h_MG = h_MG.to(tl.float32)
    if GATED:
        gate, up = _pair(h_MG, M, F)
        if LIMIT is not None:
            gate = tl.minimum(gate, LIMIT, propagate_nan=NAN)
            up = tl.clamp(up, -LIMIT, LIMIT, propagate_nan=NAN)
        value, slope = _value_and_slope(gate, KIND, SLOPE)
        a_MF = value * (up + UP_OFFSET)
    else:
        a_MF, slope = _value_and_slope(h_MG, KIND, SLOPE)
    return a_MF


@triton.jit
def activate_backward(
    grad_a_MF, weight_M1, h_MG, M: tl.constexpr, F: tl.constexpr,
    KIND: tl.constexpr, GATED: tl.constexpr, SLOPE: tl.constexpr, LIMIT: tl.constexpr, UP_OFFSET: tl.constexpr,
):  # fmt: skip
    """A [M, F], and the gradient of H in its own order for a gradient of ``weight * A``; all fp32."""
    h_MG = h_MG.to(tl.float32)
    grad_MF = grad_a_MF * weight_M1
    if GATED:
        gate, up = _pair(h_MG, M, F)
        inside_gate = gate == gate
        inside_up = inside_gate
        if LIMIT is not None:
            inside_gate = gate <= LIMIT
            inside_up = tl.abs(up) <= LIMIT
            gate = tl.minimum(gate, LIMIT, propagate_nan=NAN)
            up = tl.clamp(up, -LIMIT, LIMIT, propagate_nan=NAN)
        value, slope = _value_and_slope(gate, KIND, SLOPE)
        a_MF = value * (up + UP_OFFSET)
        grad_gate = grad_MF * (up + UP_OFFSET) * slope
        grad_up = grad_MF * value
        if LIMIT is not None:
            grad_gate = tl.where(inside_gate, grad_gate, 0.0)
            grad_up = tl.where(inside_up, grad_up, 0.0)
        grad_h_MG = tl.reshape(tl.join(grad_gate, grad_up), (M, 2 * F))
    else:
        a_MF, slope = _value_and_slope(h_MG, KIND, SLOPE)
        grad_h_MG = grad_MF * slope
    return a_MF, grad_h_MG

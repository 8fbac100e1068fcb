"""Triton: SwiGLU and its backward, which also yields the routing weights' gradient."""

# Launches take more than the kernel signature that triton.jit passes on to the type checker.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .pools import Needs
from .routing import Routing

# Elements of a row that a program holds at once: 16 bytes of bf16 for each thread of four warps.
_MAX_BLOCK = 1024


@triton.jit
def _swiglu_kernel(h_ptr, a_ptr, features, BLOCK_F: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    for f in range(0, features, BLOCK_F):
        f_F = f + tl.arange(0, BLOCK_F)
        gate_ptr_F = h_ptr + row * 2 * features + f_F
        gate_F = tl.load(gate_ptr_F, mask=f_F < features, other=0.0).to(tl.float32)
        up_F = tl.load(gate_ptr_F + features, mask=f_F < features, other=0.0).to(tl.float32)
        a_F = gate_F * tl.sigmoid(gate_F) * up_F
        tl.store(a_ptr + row * features + f_F, a_F.to(a_ptr.dtype.element_ty), mask=f_F < features)


@triton.jit(do_not_specialize=["num_positions", "grad_h_positions", "num_trained"])
def _swiglu_backward_kernel(
    grad_a_ptr, h_ptr, weights_ptr, slot_ptr, offsets_ptr, grad_h_ptr, weighted_a_ptr, grad_weights_ptr,
    num_positions, grad_h_positions, num_trained, features, BLOCK_F: tl.constexpr,
):  # fmt: skip
    # A program owns a whole row, so that the row sum needs neither atomics nor a second pass.
    row = tl.program_id(0).to(tl.int64)
    if row >= tl.load(offsets_ptr + num_positions):
        return
    # How much of this row of dH and of the weighted A is written: all of it or nothing.
    grad_h_features = tl.where(row < tl.load(offsets_ptr + grad_h_positions), features, 0)
    weighted_features = tl.where(row < tl.load(offsets_ptr + num_trained), features, 0)
    slot = tl.load(slot_ptr + row)
    weight = tl.load(weights_ptr + slot).to(tl.float32)
    sum_F = tl.zeros((BLOCK_F,), dtype=tl.float32)
    for f in range(0, features, BLOCK_F):
        f_F = f + tl.arange(0, BLOCK_F)
        in_row_F = f_F < features
        gate_offset_F = row * 2 * features + f_F
        gate_F = tl.load(h_ptr + gate_offset_F, mask=in_row_F, other=0.0).to(tl.float32)
        up_F = tl.load(h_ptr + features + gate_offset_F, mask=in_row_F, other=0.0).to(tl.float32)
        grad_a_F = tl.load(grad_a_ptr + row * features + f_F, mask=in_row_F, other=0.0).to(tl.float32)
        sigmoid_F = tl.sigmoid(gate_F)
        silu_F = gate_F * sigmoid_F
        a_F = silu_F * up_F
        if grad_weights_ptr is not None:
            sum_F += grad_a_F * a_F
        if weighted_a_ptr is not None:
            weighted_a_F = (a_F * weight).to(weighted_a_ptr.dtype.element_ty)
            tl.store(weighted_a_ptr + row * features + f_F, weighted_a_F, mask=f_F < weighted_features)
        if grad_h_ptr is not None:
            grad_up_F = grad_a_F * weight * silu_F
            grad_gate_F = grad_a_F * weight * up_F * sigmoid_F * (1 + gate_F * (1 - sigmoid_F))
            write_F = f_F < grad_h_features
            grad_gate_ptr_F = grad_h_ptr + gate_offset_F
            tl.store(grad_gate_ptr_F, grad_gate_F.to(grad_h_ptr.dtype.element_ty), mask=write_F)
            tl.store(grad_gate_ptr_F + features, grad_up_F.to(grad_h_ptr.dtype.element_ty), mask=write_F)
    if grad_weights_ptr is not None:
        tl.store(grad_weights_ptr + slot, tl.sum(sum_F, axis=0).to(grad_weights_ptr.dtype.element_ty))


def _block(features: int) -> int:
    return min(triton.next_power_of_2(features), _MAX_BLOCK)


def swiglu(h_NG: Tensor) -> Tensor:
    """silu(gate) * up, contiguous rows [N, 2F] -> [N, F]."""
    num_rows, features = h_NG.shape[0], h_NG.shape[1] // 2
    a_NF = torch.empty(num_rows, features, dtype=h_NG.dtype, device=h_NG.device)
    _swiglu_kernel[(num_rows,)](h_NG, a_NF, features, BLOCK_F=_block(features))
    return a_NF


def swiglu_backward(
    grad_a_NF: Tensor, h_NG: Tensor, weights_TK: Tensor, routing: Routing, needs: Needs
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Everything between the two input-gradient GEMMs of the backward, in one pass over the rows.

    Args:
        grad_a_NF: contiguous [N, F], gradient of the activation *before* the routing weight is applied.
        h_NG: contiguous [N, 2F] pre-activations. N may be anything down to the prefix where ``needs`` asks for
            no more than the prefix.
        weights_TK: contiguous [T, K] routing weights.

    Returns:
        grad_h_NG: written for all rows where x needs a gradient, else for the prefix; None where nobody reads it.
        weighted_a_NF: activation times routing weight, written for the prefix; None unless the weights train.
        grad_weights_TK: row sums of ``grad_a * a`` at their slots; None unless needed.
    """
    features, everyone, trained = grad_a_NF.shape[1], routing.num_experts, routing.num_trained
    grad_h_NG = torch.empty_like(h_NG) if needs.x or needs.trained else None
    weighted_a_NF = torch.empty_like(grad_a_NF) if needs.trained else None
    grad_weights_TK = torch.empty_like(weights_TK) if needs.weights else None
    _swiglu_backward_kernel[(grad_a_NF.shape[0],)](
        grad_a_NF, h_NG, weights_TK, routing.slot_N, routing.offsets_E1, grad_h_NG, weighted_a_NF, grad_weights_TK,
        everyone if needs.all_rows else trained, everyone if needs.x else trained, trained, features,
        BLOCK_F=_block(features),
    )  # fmt: skip
    return grad_h_NG, weighted_a_NF, grad_weights_TK

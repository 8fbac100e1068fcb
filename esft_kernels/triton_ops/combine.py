"""Triton: from rows back to tokens, and to their slots."""

# Launches take more than the kernel signature that triton.jit passes on to the type checker.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from esft_kernels.triton_ops.tiles import cdiv, next_power_of_2

_MAX_BLOCK = 1024
_SLOTS = 256  # of a program of ``combine_sums``


@triton.jit
def _combine_kernel(
    y_ptr,  # [T, K, D]
    row_ptr,  # int64 [T, K]
    end_ptr,  # int64 [1]
    out_ptr,  # [T, D]
    features, TOP_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    d_D = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    acc_D = tl.zeros((BLOCK_D,), dtype=tl.float32)
    end = tl.load(end_ptr)
    for k in tl.static_range(TOP_K):  # unrolled: the K loads are in flight together, and added in slot order
        written = tl.where(tl.load(row_ptr + token * TOP_K + k) < end, features, 0)
        y_D = tl.load(y_ptr + (token * TOP_K + k) * features + d_D, mask=d_D < written, other=0.0)
        acc_D += y_D.to(tl.float32)
    tl.store(out_ptr + token * features + d_D, acc_D.to(out_ptr.dtype.element_ty), mask=d_D < features)


def combine(y_TKD: Tensor, row_TK: Tensor, offsets_E1: Tensor) -> Tensor:
    """Sum over k of contiguous [T, K, D], taken in float32 in slot order; [T, D] in the dtype of y.

    Slots whose rows are of no expert are passed over: nothing was written there. ``row_TK`` and ``offsets_E1`` are a
    routing's.
    """
    num_tokens, top_k, features = y_TKD.shape
    out_TD = torch.empty(num_tokens, features, dtype=y_TKD.dtype, device=y_TKD.device)
    block = min(next_power_of_2(features), _MAX_BLOCK)
    _combine_kernel[(num_tokens, cdiv(features, block))](
        y_TKD, row_TK, offsets_E1[-1:], out_TD, features, TOP_K=top_k, BLOCK_D=block
    )
    return out_TD


@triton.jit(do_not_specialize=["num_rows", "num_slots"])
def _combine_sums_kernel(
    sums_ptr,  # fp32 [tiles, N]
    more_ptr,  # fp32 [N], or None
    row_ptr,  # int64 [N] by slot
    end_ptr,  # int64 [1]
    out_ptr,  # [N] by slot
    num_rows, num_slots, tiles, BLOCK_N: tl.constexpr,
):  # fmt: skip
    slot_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_N = tl.load(row_ptr + slot_N, mask=slot_N < num_slots, other=0)
    here_N = (slot_N < num_slots) & (row_N < tl.load(end_ptr))
    acc_N = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for _ in range(tiles):
        acc_N += tl.load(sums_ptr + row_N, mask=here_N, other=0.0)
        sums_ptr += num_rows
    if more_ptr is not None:
        acc_N += tl.load(more_ptr + row_N, mask=here_N, other=0.0)
    tl.store(out_ptr + slot_N, acc_N.to(out_ptr.dtype.element_ty), mask=slot_N < num_slots)


def combine_sums(
    sums_NX: Tensor, row_TK: Tensor, offsets_E1: Tensor, dtype: torch.dtype, more_N: Tensor | None = None
) -> Tensor:
    """Each row's sum over X, added up in order, where the row's slot is: [T, K] in ``dtype``.

    Args:
        sums_NX: fp32, the transpose of a contiguous tensor.
        row_TK, offsets_E1: a routing's. Slots whose rows are of no expert get 0: nothing was written there.
        more_N: fp32 [N], added at last.
    """
    out_TK = torch.empty(row_TK.shape, dtype=dtype, device=sums_NX.device)
    num_slots = row_TK.numel()
    _combine_sums_kernel[(cdiv(num_slots, _SLOTS),)](
        sums_NX.T, more_N, row_TK, offsets_E1[-1:], out_TK, sums_NX.shape[0], num_slots, sums_NX.shape[1],
        BLOCK_N=_SLOTS,
    )  # fmt: skip
    return out_TK

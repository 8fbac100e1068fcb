"""Triton: the sum over a token's K slots."""

# Launches take more than the kernel signature that triton.jit passes on to the type checker.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_MAX_BLOCK = 1024


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
    block = min(triton.next_power_of_2(features), _MAX_BLOCK)
    _combine_kernel[(num_tokens, triton.cdiv(features, block))](
        y_TKD, row_TK, offsets_E1[-1:], out_TD, features, TOP_K=top_k, BLOCK_D=block
    )
    return out_TD

"""Triton: the sum over a token's K slots, weighted in the forward and plain for the input gradient."""

# Launches take more than the kernel signature that triton.jit passes on to the type checker.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_MAX_BLOCK = 1024


@triton.jit
def _combine_kernel(y_ptr, weights_ptr, row_ptr, out_ptr, features, TOP_K: tl.constexpr, BLOCK_D: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    d_D = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    acc_D = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for k in tl.static_range(TOP_K):  # unrolled: the K loads are in flight together, and added in slot order
        row = tl.load(row_ptr + token * TOP_K + k)
        y_D = tl.load(y_ptr + row * features + d_D, mask=d_D < features, other=0.0).to(tl.float32)
        if weights_ptr is not None:
            y_D *= tl.load(weights_ptr + token * TOP_K + k).to(tl.float32)
        acc_D += y_D
    tl.store(out_ptr + token * features + d_D, acc_D.to(out_ptr.dtype.element_ty), mask=d_D < features)


def combine(y_ND: Tensor, row_TK: Tensor, weights_TK: Tensor | None = None) -> Tensor:
    """Sum over k of ``weights[t, k] * y[row[t, k]]``, [T, D] in the dtype of y; weights of 1 when None.

    Args:
        y_ND: contiguous [N, D].
        row_TK: contiguous int64 [T, K], a routing's (token, slot) -> row.
        weights_TK: contiguous [T, K] of any float dtype; multiplied and summed in float32.
    """
    (num_tokens, top_k), features = row_TK.shape, y_ND.shape[1]
    out_TD = torch.empty(num_tokens, features, dtype=y_ND.dtype, device=y_ND.device)
    block = min(triton.next_power_of_2(features), _MAX_BLOCK)
    _combine_kernel[(num_tokens, triton.cdiv(features, block))](
        y_ND, weights_TK, row_TK, out_TD, features, TOP_K=top_k, BLOCK_D=block
    )
    return out_TD

"""Triton: the gradients that biases have, and their part in the routing weights'."""

# Launches take more than the kernel signature that triton.jit passes on to the type checker.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from esft_kernels.pools import ExpertPools
from esft_kernels.routing import Routing
from esft_kernels.triton_ops.mainloop import block_of, expert_of, find_row_tile, weight_row
from esft_kernels.triton_ops.tiles import cdiv, max_row_tiles

_BLOCK_ROWS, _BLOCK_COLUMNS = 32, 128


@triton.jit
def _bias_grad_kernel(
    grad_ptr,  # [X, C], read at index_ptr[row], or at the row itself
    index_ptr,  # int64 [N], or None
    weights_ptr, slot_ptr,  # [N] by slot and int64 [N], or None
    out_ptr,  # [S, C]
    offsets_ptr,  # int64 [S + 1]
    columns, PAIRED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    position = tl.program_id(0).to(tl.int64)
    n_N = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_cols_1N = (n_N < columns)[None, :]
    end = tl.load(offsets_ptr + position + 1)
    acc_N = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for first in range(tl.load(offsets_ptr + position), end, BLOCK_M):
        row_M = first + tl.arange(0, BLOCK_M)
        source_M = row_M
        if index_ptr is not None:
            source_M = tl.load(index_ptr + row_M, mask=row_M < end, other=0)
        mask_MN = (row_M < end)[:, None] & in_cols_1N
        grad_MN = tl.load(grad_ptr + source_M[:, None] * columns + n_N[None, :], mask=mask_MN, other=0.0)
        grad_MN = grad_MN.to(tl.float32)
        if weights_ptr is not None:
            slot_M = tl.load(slot_ptr + row_M, mask=row_M < end, other=0)
            grad_MN *= tl.load(weights_ptr + slot_M, mask=row_M < end, other=0.0).to(tl.float32)[:, None]
        acc_N += tl.sum(grad_MN, axis=0)
    out_N = weight_row(n_N, columns // 2, PAIRED)
    tl.store(out_ptr + position * columns + out_N, acc_N.to(out_ptr.dtype.element_ty), mask=n_N < columns)


def bias_grad(
    grad_XC: Tensor,
    offsets_S1: Tensor,
    index_N: Tensor | None = None,
    weights_TK: Tensor | None = None,
    slot_N: Tensor | None = None,
    paired: bool = False,
) -> Tensor:
    """Sum of each trained position's gradient rows, [S, C]; zeros for an expert without rows.

    Args:
        grad_XC: contiguous [X, C], read at row n, or at row ``index_N[n]``.
        offsets_S1: contiguous int64 [S + 1], the front of a routing's offsets. No row past the last is read.
        weights_TK, slot_N: multiply row n by the routing weight at ``slot_N[n]``; both or neither.
        paired: columns are (gate, up) in turn, and the result has all gates first.
    """
    num_trained, columns = offsets_S1.numel() - 1, grad_XC.shape[1]
    out_SC = torch.empty(num_trained, columns, dtype=grad_XC.dtype, device=grad_XC.device)
    _bias_grad_kernel[(num_trained, cdiv(columns, _BLOCK_COLUMNS))](
        grad_XC, index_N, weights_TK, slot_N, out_SC, offsets_S1,
        columns, PAIRED=paired, BLOCK_M=_BLOCK_ROWS, BLOCK_N=_BLOCK_COLUMNS,
    )  # fmt: skip
    return out_SC


@triton.jit(do_not_specialize=["num_positions", "num_trained"])
def _bias_dot_kernel(
    grad_out_ptr,  # [T, D]
    token_ptr,  # int64 [N]
    trained_ptr, frozen_ptr,  # [S, D] and [R, D]
    out_ptr,  # fp32 [N]
    offsets_ptr,  # int64 [P + 1]
    hidden, num_positions, num_trained,
    BLOCK_P: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    position, first, end = find_row_tile(tl.program_id(0), offsets_ptr, num_positions, BLOCK_M, BLOCK_P)
    if first >= end:
        return
    row_M = first + tl.arange(0, BLOCK_M)
    token_M = tl.load(token_ptr + tl.minimum(row_M, end - 1))
    bias_ptr = expert_of(trained_ptr, frozen_ptr, position, num_trained, hidden)
    acc_M = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for d in range(0, hidden, BLOCK_N):
        d_N = d + tl.arange(0, BLOCK_N)
        bias_N = tl.load(bias_ptr + d_N, mask=d_N < hidden, other=0.0).to(tl.float32)
        mask_MN = (d_N < hidden)[None, :] & (row_M < end)[:, None]
        grad_MN = tl.load(grad_out_ptr + token_M[:, None] * hidden + d_N[None, :], mask=mask_MN, other=0.0)
        acc_M += tl.sum(grad_MN.to(tl.float32) * bias_N[None, :], axis=1)
    tl.store(out_ptr + row_M, acc_M, mask=row_M < end)


def bias_dot(grad_out_TD: Tensor, pools: ExpertPools, routing: Routing) -> Tensor:
    """``grad_out[token] @ down_bias`` of every row, fp32 [N]: the bias's part in the routing weights' gradient."""
    num_rows, positions = routing.num_rows, routing.num_experts
    out_N = grad_out_TD.new_empty(num_rows, dtype=torch.float32)
    _bias_dot_kernel[(max_row_tiles(num_rows, positions, _BLOCK_ROWS),)](
        grad_out_TD, routing.token_N, pools.trained.down_bias_ED, pools.frozen.down_bias_ED, out_N,
        routing.offsets_E1, pools.hidden_size, positions, routing.num_trained,
        BLOCK_P=block_of(positions), BLOCK_M=_BLOCK_ROWS, BLOCK_N=_BLOCK_COLUMNS,
    )  # fmt: skip
    return out_N

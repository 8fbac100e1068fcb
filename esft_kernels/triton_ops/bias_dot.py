"""Triton: the part of the down projection's bias in the routing weights' gradient."""

# Launches take more than the kernel signature that triton.jit passes on to the type checker.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from esft_kernels.pools import ExpertPools
from esft_kernels.routing import Routing
from esft_kernels.triton_ops.mainloop import block_of, expert_of, find_row_tile
from esft_kernels.triton_ops.tiles import max_row_tiles

_BLOCK_ROWS, _BLOCK_COLUMNS = 32, 128


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

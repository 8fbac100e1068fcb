"""Triton: rows x expert weights, for the forward and for the input gradients."""

# Launches take more than the kernel signature that triton.jit passes on to the type checker.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import choose_tiles, device_arch, max_row_tiles


@triton.jit
def find_row_tile(tile, offsets_ptr, num_positions, BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr):
    """Expert position, first row and last row + 1 of a row tile; see ``tiles.tile_schedule``.

    A tile past the last expert has position ``num_positions`` and no rows.
    """
    pos_P = tl.arange(0, BLOCK_P)
    end_P = tl.load(offsets_ptr + 1 + pos_P, mask=pos_P < num_positions, other=0)
    passed_P = (pos_P < num_positions) & (end_P // BLOCK_M + pos_P + 1 <= tile)
    position = tl.sum(passed_P.to(tl.int32), axis=0)
    start = tl.load(offsets_ptr + position)
    end = tl.load(offsets_ptr + position + 1, mask=position < num_positions, other=0)
    return position, start + (tile - start // BLOCK_M - position) * BLOCK_M, end


@triton.jit
def dot(a_MK, b_KN, acc_MN, EXACT: tl.constexpr):
    """Matrix product on top of an fp32 accumulator; EXACT multiplies in full fp32, see ``exact_dot``."""
    if EXACT:
        return tl.dot(a_MK.to(tl.float32), b_KN.to(tl.float32), acc_MN, input_precision="ieee")
    return tl.dot(a_MK, b_KN, acc_MN)


def exact_dot(rows: Tensor) -> bool:
    """Whether products are taken in fp32: for fp32 itself, where tf32 would lose 13 bits, and in the interpreter.

    Triton's interpreter keeps bf16 as bare bits and would multiply those as integers. The product of two
    16-bit floats is exact in fp32, so the result is the one that the hardware gives.
    """
    return rows.dtype == torch.float32 or rows.device.type == "cpu"


@triton.jit(do_not_specialize=["num_positions", "num_trained"])
def _grouped_gemm_kernel(
    rows_ptr, index_ptr, trained_ptr, frozen_ptr, out_ptr, offsets_ptr,
    num_positions, num_trained, in_features, out_features, stride_expert, stride_out, stride_in,
    EXACT: tl.constexpr, BLOCK_P: tl.constexpr, GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    n_tiles = tl.cdiv(out_features, BLOCK_N)
    m_tiles = tl.num_programs(0) // n_tiles
    pid = tl.program_id(0)
    m_tile, n_tile = tl.swizzle2d(pid // n_tiles, pid % n_tiles, m_tiles, n_tiles, GROUP_M)
    position, first, end = find_row_tile(m_tile, offsets_ptr, num_positions, BLOCK_M, BLOCK_P)
    if first >= end:
        return
    if position < num_trained:
        weight_ptr = trained_ptr + position.to(tl.int64) * stride_expert
    else:
        weight_ptr = frozen_ptr + (position - num_trained).to(tl.int64) * stride_expert

    row_M = first + tl.arange(0, BLOCK_M)  # int64, like the offsets: rows x features can pass 2**31
    in_rows_M1 = (row_M < end)[:, None]
    if index_ptr is not None:
        source_M = tl.load(index_ptr + row_M, mask=row_M < end, other=0)
    else:
        source_M = row_M
    n_N = n_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    in_cols_1N = (n_N < out_features)[None, :]
    k_K = tl.arange(0, BLOCK_K)
    row_ptr_MK = rows_ptr + source_M[:, None] * in_features + k_K[None, :]
    # Within one expert 32-bit offsets do.
    weight_ptr_KN = weight_ptr + k_K[:, None] * stride_in + n_N[None, :] * stride_out

    acc_MN = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, in_features, BLOCK_K):
        # Both sides are zero past the last input feature: a zero alone would not silence a NaN on the other side.
        in_k_K = k_K < in_features - k
        rows_MK = tl.load(row_ptr_MK, mask=in_rows_M1 & in_k_K[None, :], other=0.0)
        weight_KN = tl.load(weight_ptr_KN, mask=in_k_K[:, None] & in_cols_1N, other=0.0)
        acc_MN = dot(rows_MK, weight_KN, acc_MN, EXACT)
        row_ptr_MK += BLOCK_K
        weight_ptr_KN += BLOCK_K * stride_in
    out_ptr_MN = out_ptr + row_M[:, None] * out_features + n_N[None, :]
    tl.store(out_ptr_MN, acc_MN.to(out_ptr.dtype.element_ty), mask=in_rows_M1 & in_cols_1N)


def grouped_gemm(
    rows_XI: Tensor,
    trained_SOI: Tensor,
    frozen_ROI: Tensor,
    offsets_P1: Tensor,
    num_rows: int,
    index_N: Tensor | None = None,
) -> Tensor:
    """``rows[e] @ weight(e).T`` for the expert positions 0..P-1, [num_rows, O].

    Args:
        rows_XI: contiguous [X, I]; row n of the output belongs to row n of it, or to row ``index_N[n]``.
        trained_SOI: weights of positions 0..S-1, any strides: a transposed view gives the input gradient.
        frozen_ROI: weights of positions S.., with the same strides; read only where P > S.
        offsets_P1: contiguous int64 [P + 1], may be the front of a routing's offsets.
        num_rows: at least ``offsets_P1[-1]``; output rows from there on are left unwritten.
        index_N: int64 [num_rows or more], or None.
    """
    (num_trained, out_features, in_features), num_positions = trained_SOI.shape, offsets_P1.numel() - 1
    out_NO = torch.empty(num_rows, out_features, dtype=rows_XI.dtype, device=rows_XI.device)
    arch, rows_per_expert = device_arch(rows_XI.device), num_rows // max(num_positions, 1)
    tiles = choose_tiles(arch, rows_XI.dtype, "gemm", rows_per_expert, (out_features, in_features))
    row_tiles = max_row_tiles(num_rows, num_positions, tiles.block_m)
    grid = (row_tiles * triton.cdiv(out_features, tiles.block_n),)
    strided = trained_SOI if num_trained else frozen_ROI
    _grouped_gemm_kernel[grid](
        rows_XI, index_N, trained_SOI, frozen_ROI, out_NO, offsets_P1,
        num_positions, num_trained, in_features, out_features, *strided.stride(),
        EXACT=exact_dot(rows_XI), BLOCK_P=triton.next_power_of_2(max(num_positions, 1)), GROUP_M=tiles.group_m,
        BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, BLOCK_K=tiles.block_k,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    return out_NO

"""Triton: the weight gradients of the trained experts, which are the first positions of every routing."""

# Launches take more than the kernel signature that triton.jit passes on to the type checker.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from esft_kernels.triton_ops.descriptors import aligned, launch, rows_descriptor
from esft_kernels.triton_ops.mainloop import dot, precision, row_offsets, weight_row, wide
from esft_kernels.triton_ops.tiles import cdiv, splits_for, tiles_for


@triton.jit
def _load_rows(
    ptr, index_ptr, tiles, first, end, first_column, column, features,
    MASKED: tl.constexpr, WIDE: tl.constexpr, EVEN: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Rows ``first`` to ``first + BLOCK_K`` of a tensor, or those that an index names; zero from ``end`` on."""
    if tiles is not None:
        rows_KC = tiles.load([tl.cast(first, tl.int32), first_column])
    else:
        k_K = tl.arange(0, BLOCK_K)
        inside_K = k_K < end - first
        if index_ptr is None:  # contiguous rows: one 64-bit base, 32-bit offsets
            offset_K = k_K
            ptr += first * features
        elif MASKED:
            offset_K = tl.load(index_ptr + first + k_K, mask=inside_K, other=0)
        else:
            offset_K = tl.load(index_ptr + first + k_K)
        offset_KC = row_offsets(offset_K, column, features, WIDE)
        if MASKED:
            rows_KC = tl.load(ptr + offset_KC, mask=inside_K[:, None] & (column < features)[None, :], other=0.0)
        elif EVEN:
            rows_KC = tl.load(ptr + offset_KC)
        else:
            rows_KC = tl.load(ptr + offset_KC, mask=(column < features)[None, :], other=0.0)
    return rows_KC


@triton.jit
def _add_rows(
    acc_MN, grad_ptr, grad_index_ptr, grad_tiles, rows_ptr, rows_index_ptr, row_tiles, first, end,
    first_m, m_M, first_n, n_N, out_features, in_features,
    MASKED: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, EVEN_M: tl.constexpr, EVEN_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    grad_KM = _load_rows(
        grad_ptr, grad_index_ptr, grad_tiles, first, end, first_m, m_M, out_features, MASKED, WIDE, EVEN_M, BLOCK_K
    )
    rows_KN = _load_rows(
        rows_ptr, rows_index_ptr, row_tiles, first, end, first_n, n_N, in_features, MASKED, WIDE, EVEN_N, BLOCK_K
    )
    return dot(tl.trans(grad_KM), rows_KN, acc_MN, PRECISION)


@triton.jit
def _grouped_wgrad_kernel(
    grad_ptr,  # [X, O], read at grad_index_ptr[row], or at the row itself
    grad_index_ptr,  # int64 [N], or None
    rows_ptr,  # [Y, I], read at rows_index_ptr[row], or at the row itself
    rows_index_ptr,  # int64 [N], or None
    out_ptr,  # [S, O, I], strided; with SPLITS > 1 fp32, one such after another
    offsets_ptr,  # int64 [S + 1]
    stride_split, stride_expert, stride_out, stride_in,
    out_features, in_features,
    PAIRED: tl.constexpr, PRECISION: tl.constexpr, EVEN_M: tl.constexpr, EVEN_N: tl.constexpr, SPLITS: tl.constexpr,
    GRAD_TILES: tl.constexpr, ROW_TILES: tl.constexpr, WIDE: tl.constexpr,
    GROUP_M: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # One program owns one tile of one expert's gradient and walks over its rows in order: no atomics, the
    # same bits every time, and an expert without rows gets its zeros from the accumulator.
    n_tiles = tl.cdiv(in_features, BLOCK_N)
    m_tiles = tl.cdiv(out_features, BLOCK_M)
    position = tl.program_id(0) // (m_tiles * n_tiles)
    pid = tl.program_id(0) % (m_tiles * n_tiles)
    m_tile, n_tile = tl.swizzle2d(pid // n_tiles, pid % n_tiles, m_tiles, n_tiles, GROUP_M)
    m_M = m_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    n_N = n_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    start = tl.load(offsets_ptr + position)
    end = tl.load(offsets_ptr + position + 1)
    if SPLITS > 1:  # whole blocks of rows to each, so that no two programs share one
        share = tl.cdiv(tl.cdiv(end - start, BLOCK_K), SPLITS) * BLOCK_K
        start += tl.program_id(1) * share
        end = tl.minimum(end, start + share)

    grad_tiles = None
    row_tiles = None
    if GRAD_TILES:
        grad_tiles = rows_descriptor(grad_ptr, end, out_features, BLOCK_K, BLOCK_M)
    if ROW_TILES:
        row_tiles = rows_descriptor(rows_ptr, end, in_features, BLOCK_K, BLOCK_N)
    acc_MN = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    # Whole blocks first, without a comparison per row; then what is left.
    whole = tl.maximum(end - start, 0) // BLOCK_K * BLOCK_K
    for first in range(start, start + whole, BLOCK_K):
        acc_MN = _add_rows(
            acc_MN, grad_ptr, grad_index_ptr, grad_tiles, rows_ptr, rows_index_ptr, row_tiles, first, end,
            m_tile * BLOCK_M, m_M, n_tile * BLOCK_N, n_N, out_features, in_features,
            False, WIDE, PRECISION, EVEN_M, EVEN_N, BLOCK_K,
        )  # fmt: skip
    if start + whole < end:
        acc_MN = _add_rows(
            acc_MN, grad_ptr, grad_index_ptr, grad_tiles, rows_ptr, rows_index_ptr, row_tiles, start + whole, end,
            m_tile * BLOCK_M, m_M, n_tile * BLOCK_N, n_N, out_features, in_features,
            True, WIDE, PRECISION, EVEN_M, EVEN_N, BLOCK_K,
        )  # fmt: skip
    out_M = weight_row(m_M, out_features // 2, PAIRED)
    out_ptr += position.to(tl.int64) * stride_expert + tl.program_id(1).to(tl.int64) * stride_split
    out_ptr_MN = out_ptr + out_M[:, None] * stride_out + n_N[None, :] * stride_in
    mask_MN = (m_M < out_features)[:, None] & (n_N < in_features)[None, :]
    tl.store(out_ptr_MN, acc_MN.to(out_ptr.dtype.element_ty), mask=mask_MN)


def grouped_wgrad(
    grad_rows_XO: Tensor,
    rows_YI: Tensor,
    like_SOI: Tensor,
    offsets_S1: Tensor,
    grad_index_N: Tensor | None = None,
    rows_index_N: Tensor | None = None,
    paired: bool = False,
) -> Tensor:
    """``grad_rows[e].T @ rows[e]`` for the positions 0..S-1, [S, O, I]; zeros for an expert without rows.

    Args:
        grad_rows_XO: contiguous [X, O], read at row n, or at row ``grad_index_N[n]``.
        rows_YI: contiguous [Y, I], read at row n, or at row ``rows_index_N[n]``.
        like_SOI: the weights; the gradient gets their dtype and strides.
        offsets_S1: contiguous int64 [S + 1], the front of a routing's offsets. No row past the last is read.
        grad_index_N, rows_index_N: int64, as long as the prefix or longer, or None.
        paired: the columns of ``grad_rows`` are (gate, up) in turn, and the weights have all gates first.
    """
    num_trained, out_features, in_features = like_SOI.shape
    # The rows per trained expert are known to the device only, and not asked for.
    tiles = tiles_for(rows_YI, "wgrad", 0, (out_features, in_features))
    m_tiles, n_tiles = cdiv(out_features, tiles.block_m), cdiv(in_features, tiles.block_n)
    programs = num_trained * m_tiles * n_tiles
    grad_SOI = torch.empty_like(like_SOI)
    splits = splits_for(rows_YI, programs)
    out = grad_SOI
    if splits > 1:
        out = torch.empty(splits, num_trained, out_features, in_features, dtype=torch.float32, device=rows_YI.device)
    # Rows that lie together; those that an index names have their addresses.
    grad_tiles = tiles.descriptors and grad_index_N is None and aligned(grad_rows_XO)
    row_tiles = tiles.descriptors and rows_index_N is None and aligned(rows_YI)
    launch(
        _grouped_wgrad_kernel[(programs, splits)], tiles.descriptors,
        grad_rows_XO, grad_index_N, rows_YI, rows_index_N, out, offsets_S1,
        out.stride(0) if splits > 1 else 0, *out.stride()[-3:], out_features, in_features,
        PAIRED=paired, PRECISION=precision(rows_YI), EVEN_M=out_features % tiles.block_m == 0,
        EVEN_N=in_features % tiles.block_n == 0, SPLITS=splits,
        GRAD_TILES=grad_tiles, ROW_TILES=row_tiles, WIDE=wide(grad_rows_XO, rows_YI), **tiles.launch_options(),
    )  # fmt: skip
    return grad_SOI.copy_(out.sum(dim=0)) if splits > 1 else grad_SOI

"""Triton: the up projection of all routed rows, activated on the way out."""

# Launches take more than the kernel signature that triton.jit passes on to the type checker.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from esft_kernels.pools import ExpertPools
from esft_kernels.triton_ops.decode import Coded, stack, weight_operands
from esft_kernels.triton_ops.descriptors import launch
from esft_kernels.triton_ops.gate import activate, constants
from esft_kernels.triton_ops.mainloop import (
    block_of,
    count_tiles,
    expert_of,
    find_tile,
    halves,
    multiply,
    precision,
    row_offsets,
    weight_row,
    wide,
)
from esft_kernels.triton_ops.tiles import cdiv, max_row_tiles, programs_for, tiles_for

PIECE = tl.constexpr(32)  # columns that are finished together


@triton.jit
def _finish(
    h_MG, row_M, first, end, first_column, bias_ptr, h_ptr, a_ptr, features, keep_rows,
    M: tl.constexpr, G: tl.constexpr,
    KIND: tl.constexpr, GATED: tl.constexpr, SLOPE: tl.constexpr, LIMIT: tl.constexpr, UP_OFFSET: tl.constexpr,
    PAIRED: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    """Store H and A of G columns; a few at a time, for all at once would not fit the registers."""
    if G > PIECE:
        HALF: tl.constexpr = G // 2
        left_MG, right_MG = halves(h_MG, M, G)
        _finish(
            left_MG, row_M, first, end, first_column, bias_ptr, h_ptr, a_ptr, features, keep_rows,
            M, HALF, KIND, GATED, SLOPE, LIMIT, UP_OFFSET, PAIRED, OUT,
        )  # fmt: skip
        _finish(
            right_MG, row_M, first, end, first_column + HALF, bias_ptr, h_ptr, a_ptr, features, keep_rows,
            M, HALF, KIND, GATED, SLOPE, LIMIT, UP_OFFSET, PAIRED, OUT,
        )  # fmt: skip
    else:
        WIDTH: tl.constexpr = 2 if GATED else 1
        F: tl.constexpr = G // WIDTH
        columns = features * WIDTH
        g_G, m_M1 = first_column + tl.arange(0, G), tl.arange(0, M)[:, None]
        in_cols_1G = (g_G < columns)[None, :]
        if bias_ptr is not None:
            bias_G = tl.load(bias_ptr + weight_row(g_G, features, PAIRED), mask=g_G < columns, other=0.0)
            h_MG += bias_G.to(tl.float32)[None, :]
        # Rounded as it is stored, so that the A of the backward, made from the stored H, is this one.
        h_MG = h_MG.to(OUT)
        # One 64-bit base for the tile and 32-bit offsets within it: they are many, and live in registers.
        if h_ptr is not None:
            kept_M1 = (row_M < tl.minimum(end, keep_rows))[:, None]
            tl.store(h_ptr + first * columns + (m_M1 * columns + g_G[None, :]), h_MG, mask=kept_M1 & in_cols_1G)
        if a_ptr is not None:
            a_MF = activate(h_MG, M, F, KIND, GATED, SLOPE, LIMIT, UP_OFFSET).to(OUT)
            f_F = first_column // WIDTH + tl.arange(0, F)
            mask_MF = (row_M < end)[:, None] & (f_F < features)[None, :]
            tl.store(a_ptr + first * features + (m_M1 * features + f_F[None, :]), a_MF, mask=mask_MF)


@triton.jit
def _make_tile(
    position, first, end, n_tile,
    x_ptr, token_ptr, trained_ptr, frozen_ptr, scales_ptr, values_ptr, trained_bias_ptr, frozen_bias_ptr, h_ptr, a_ptr,
    stride_expert, stride_out, stride_in, stride_scales, scale_columns, hidden, features, num_trained, keep_rows,
    KIND: tl.constexpr, GATED: tl.constexpr, SLOPE: tl.constexpr, LIMIT: tl.constexpr, UP_OFFSET: tl.constexpr,
    FORMAT: tl.constexpr, TRANSPOSED: tl.constexpr, LAYOUT: tl.constexpr, PAIRED: tl.constexpr,
    PRECISION: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Make H and A of one expert's rows from ``first`` on."""
    columns = features * 2 if GATED else features
    row_M = first + tl.arange(0, BLOCK_M)  # int64, like the offsets: rows x features can pass 2**31
    token_M = tl.load(token_ptr + tl.minimum(row_M, end - 1))
    n_N = n_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    in_cols_N = n_N < columns
    out_N = weight_row(n_N, features, PAIRED)
    k_K = tl.arange(0, BLOCK_K)
    weight_ptr = expert_of(trained_ptr, frozen_ptr, position, num_trained, stride_expert)
    h_MG = multiply(
        x_ptr, row_offsets(token_M, k_K, hidden, WIDE), None, 0,
        weight_ptr, out_N[None, :], k_K[:, None], BLOCK_K, in_cols_N[None, :], n_tile * BLOCK_N, columns,
        hidden, stride_out, stride_in,
        scales_ptr, position.to(tl.int64) * stride_scales, values_ptr, scale_columns,
        FORMAT, TRANSPOSED, LAYOUT, PAIRED, PRECISION, EVEN_N, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    bias_ptr = trained_bias_ptr
    if trained_bias_ptr is not None:
        bias_ptr = expert_of(trained_bias_ptr, frozen_bias_ptr, position, num_trained, columns)
    _finish(
        h_MG, row_M, first, end, n_tile * BLOCK_N, bias_ptr, h_ptr, a_ptr, features, keep_rows,
        BLOCK_M, BLOCK_N, KIND, GATED, SLOPE, LIMIT, UP_OFFSET, PAIRED, x_ptr.dtype.element_ty,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_positions", "num_trained", "keep_rows"])
def _up_gemm_kernel(
    x_ptr,  # [T, D]
    token_ptr,  # int64 [N]
    trained_ptr, frozen_ptr,  # [S, G, D] and [R, G, D], strided
    scales_ptr, values_ptr,  # of frozen weights that are coded, else None
    trained_bias_ptr, frozen_bias_ptr,  # [S, G] and [R, G], or None
    h_ptr,  # [keep_rows, G], columns (gate, up) in turn, or None
    a_ptr,  # [N, F], or None
    offsets_ptr,  # int64 [P + 1]
    stride_expert, stride_out, stride_in, stride_scales, scale_columns,
    hidden, features, num_positions, num_trained, keep_rows,
    KIND: tl.constexpr, GATED: tl.constexpr, SLOPE: tl.constexpr, LIMIT: tl.constexpr, UP_OFFSET: tl.constexpr,
    FORMAT: tl.constexpr, TRANSPOSED: tl.constexpr, LAYOUT: tl.constexpr, PAIRED: tl.constexpr,
    PRECISION: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, WIDE: tl.constexpr, PERSISTENT: tl.constexpr,
    BLOCK_P: tl.constexpr, GROUP_M: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    columns = features * 2 if GATED else features
    if PERSISTENT:
        tiles = count_tiles(columns, offsets_ptr, num_positions, BLOCK_M, BLOCK_N)
        for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
            position, first, end, n_tile = find_tile(
                tile, tiles, columns, offsets_ptr, num_positions, GROUP_M, BLOCK_M, BLOCK_N, BLOCK_P
            )
            if first < end:
                _make_tile(
                    position, first, end, n_tile,
                    x_ptr, token_ptr, trained_ptr, frozen_ptr, scales_ptr, values_ptr, trained_bias_ptr,
                    frozen_bias_ptr, h_ptr, a_ptr,
                    stride_expert, stride_out, stride_in, stride_scales, scale_columns, hidden, features, num_trained,
                    keep_rows,
                    KIND, GATED, SLOPE, LIMIT, UP_OFFSET, FORMAT, TRANSPOSED, LAYOUT, PAIRED,
                    PRECISION, EVEN_N, EVEN_K, WIDE, BLOCK_M, BLOCK_N, BLOCK_K,
                )  # fmt: skip
    else:  # without a loop, so that a grid compiles to what it was before there was one
        position, first, end, n_tile = find_tile(
            tl.program_id(0), tl.num_programs(0), columns, offsets_ptr, num_positions,
            GROUP_M, BLOCK_M, BLOCK_N, BLOCK_P,
        )  # fmt: skip
        if first >= end:
            return
        _make_tile(
            position, first, end, n_tile,
            x_ptr, token_ptr, trained_ptr, frozen_ptr, scales_ptr, values_ptr, trained_bias_ptr, frozen_bias_ptr,
            h_ptr, a_ptr,
            stride_expert, stride_out, stride_in, stride_scales, scale_columns, hidden, features, num_trained,
            keep_rows,
            KIND, GATED, SLOPE, LIMIT, UP_OFFSET, FORMAT, TRANSPOSED, LAYOUT, PAIRED,
            PRECISION, EVEN_N, EVEN_K, WIDE, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip


def up_gemm(
    x_TD: Tensor,
    token_N: Tensor,
    pools: ExpertPools,
    offsets_P1: Tensor,
    num_trained: int,
    h_XG: Tensor | None,
    a_NF: Tensor | None,
    rows_per_expert: int | None = None,
) -> None:
    """Fill H and A for the rows of some expert positions; what lies outside them is left alone.

    Args:
        x_TD: contiguous [T, D].
        token_N: int64 [N], row -> token.
        offsets_P1: contiguous int64 [P + 1], a stretch of a routing's offsets: rows are numbered from 0 all the same.
        num_trained: how many of the P positions are the trained pool's, from its first on; the others are the frozen
            pool's, from its first on.
        h_XG: contiguous [X, G], X <= N: written for rows below X, gate and up columns in turn. None: not written.
        a_NF: contiguous [N, F], or None.
        rows_per_expert: what tiles are chosen for; by default what all rows are to all experts.
    """
    columns, hidden, num_positions = pools.gate_up_size, pools.hidden_size, offsets_P1.numel() - 1
    frozen, paired = stack(pools.frozen, "gate_up"), pools.activation.gated and not pools.interleaved
    num_rows = token_N.numel()
    # The same tiles for a part of the positions as for all: rows that are made again come out with the same bits.
    if rows_per_expert is None:
        rows_per_expert = num_rows // max(pools.num_experts, 1)
    tiles = tiles_for(x_TD, "up", rows_per_expert, (columns, hidden), isinstance(frozen, Coded))
    pointers, strides, coding = weight_operands(
        pools.trained.gate_up_EGD[:num_trained], frozen, tiles.descriptors, "out" if paired else None
    )
    count = max_row_tiles(num_rows, num_positions, tiles.block_m) * cdiv(columns, tiles.block_n)
    launch(
        _up_gemm_kernel[(programs_for(x_TD, tiles, count),)], tiles.descriptors,
        x_TD, token_N, *pointers, pools.trained.gate_up_bias_EG, pools.frozen.gate_up_bias_EG, h_XG, a_NF, offsets_P1,
        *strides, hidden, pools.intermediate_size, num_positions, num_trained,
        0 if h_XG is None else h_XG.shape[0],
        **constants(pools.activation), **coding, PAIRED=paired, PERSISTENT=tiles.persistent > 0,
        PRECISION=precision(x_TD), EVEN_N=columns % tiles.block_n == 0, EVEN_K=hidden % tiles.block_k == 0,
        WIDE=wide(x_TD), BLOCK_P=block_of(num_positions), **tiles.launch_options(),
    )  # fmt: skip

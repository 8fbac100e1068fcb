"""Triton: the backward of the down projection and of the activation, in one GEMM."""

# Launches take more than the kernel signature that triton.jit passes on to the type checker.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from esft_kernels.backend import Needs
from esft_kernels.pools import ExpertPools
from esft_kernels.routing import Routing
from esft_kernels.triton_ops.decode import Coded, stack, weight_operands
from esft_kernels.triton_ops.descriptors import launch
from esft_kernels.triton_ops.gate import activate_backward, constants
from esft_kernels.triton_ops.mainloop import (
    block_of,
    count_tiles,
    expert_of,
    find_tile,
    halves,
    multiply,
    precision,
    row_offsets,
    wide,
)
from esft_kernels.triton_ops.tiles import cdiv, max_row_tiles, programs_for, tiles_for

PIECE = tl.constexpr(16)  # columns that are finished together


@triton.jit
def _offsets(first_column, columns, M: tl.constexpr, G: tl.constexpr):
    """Of a piece of H and of its gradient, and the columns: 32 bits do within a tile, from one 64-bit base."""
    g_G = first_column + tl.arange(0, G)
    return tl.arange(0, M)[:, None] * columns + g_G[None, :], (g_G < columns)[None, :]


@triton.jit
def _load_h(h_ptr, first, rows, first_column, columns, M: tl.constexpr, G: tl.constexpr, WIDEST: tl.constexpr):
    """G columns of H in pieces: two halves of halves and so on, as the accumulator is halved."""
    if G > WIDEST:
        HALF: tl.constexpr = G // 2
        left = _load_h(h_ptr, first, rows, first_column, columns, M, HALF, WIDEST)
        right = _load_h(h_ptr, first, rows, first_column + HALF, columns, M, HALF, WIDEST)
        pieces = left, right
    else:
        offset_MG, in_columns_1G = _offsets(first_column, columns, M, G)
        pieces = tl.load(
            h_ptr + first * columns + offset_MG, mask=(tl.arange(0, M) < rows)[:, None] & in_columns_1G, other=0.0
        )
    return pieces


@triton.jit
def _finish(
    grad_a_MN, weight_M1, h, first, rows, grad_h_rows, weighted_rows, first_column,
    grad_h_ptr, weighted_a_ptr, features,
    AHEAD: tl.constexpr, M: tl.constexpr, N: tl.constexpr, WIDEST: tl.constexpr,
    KIND: tl.constexpr, GATED: tl.constexpr, SLOPE: tl.constexpr, LIMIT: tl.constexpr, UP_OFFSET: tl.constexpr,
):  # fmt: skip
    """Gradient of H and weighted A of N columns, and their part [M] of the row sums of ``grad_a * a``.

    ``h`` is what ``_load_h`` gave where it was AHEAD, else where all of H begins. A few columns at a time:
    what lies between H and its gradient would not fit the registers for all at once.
    """
    if N > WIDEST:
        HALF: tl.constexpr = N // 2
        left_MN, right_MN = halves(grad_a_MN, M, N)
        if AHEAD:
            left_h = h[0]
            right_h = h[1]
        else:
            left_h = h
            right_h = h
        left_M = _finish(
            left_MN, weight_M1, left_h, first, rows, grad_h_rows, weighted_rows, first_column,
            grad_h_ptr, weighted_a_ptr, features, AHEAD, M, HALF, WIDEST, KIND, GATED, SLOPE, LIMIT, UP_OFFSET,
        )  # fmt: skip
        right_M = _finish(
            right_MN, weight_M1, right_h, first, rows, grad_h_rows, weighted_rows, first_column + HALF,
            grad_h_ptr, weighted_a_ptr, features, AHEAD, M, HALF, WIDEST, KIND, GATED, SLOPE, LIMIT, UP_OFFSET,
        )  # fmt: skip
        sum_M = left_M + right_M
    else:
        WIDTH: tl.constexpr = 2 if GATED else 1
        m_M = tl.arange(0, M)
        if AHEAD:
            h_MG = h
        else:
            h_MG = _load_h(h, first, rows, first_column * WIDTH, features * WIDTH, M, N * WIDTH, N * WIDTH)
        a_MN, grad_h_MG = activate_backward(grad_a_MN, weight_M1, h_MG, M, N, KIND, GATED, SLOPE, LIMIT, UP_OFFSET)
        offset_MN, in_cols_1N = _offsets(first_column, features, M, N)
        if weighted_a_ptr is not None:
            weighted_MN = (a_MN * weight_M1).to(weighted_a_ptr.dtype.element_ty)
            tl.store(
                weighted_a_ptr + first * features + offset_MN,
                weighted_MN,
                mask=(m_M < weighted_rows)[:, None] & in_cols_1N,
            )
        if grad_h_ptr is not None:
            offset_MG, in_cols_1G = _offsets(first_column * WIDTH, features * WIDTH, M, N * WIDTH)
            tl.store(
                grad_h_ptr + first * (features * WIDTH) + offset_MG,
                grad_h_MG,
                mask=(m_M < grad_h_rows)[:, None] & in_cols_1G,
            )
        sum_M = tl.sum(tl.where(in_cols_1N, grad_a_MN * a_MN, 0.0), axis=1)
    return sum_M


@triton.jit
def _make_tile(
    position, first, end, n_tile,
    grad_out_ptr, token_ptr, slot_ptr, weights_ptr, trained_ptr, frozen_ptr, scales_ptr, values_ptr,
    h_ptr, grad_h_ptr, weighted_a_ptr, sums_ptr, offsets_ptr,
    stride_expert, stride_out, stride_in, stride_scales, scale_columns,
    hidden, features, num_rows, num_trained, grad_h_positions,
    KIND: tl.constexpr, GATED: tl.constexpr, SLOPE: tl.constexpr, LIMIT: tl.constexpr, UP_OFFSET: tl.constexpr,
    FORMAT: tl.constexpr, TRANSPOSED: tl.constexpr, LAYOUT: tl.constexpr, PRECISION: tl.constexpr,
    EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, WIDE: tl.constexpr, AHEAD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Make what the activation's backward yields, of one expert's rows from ``first`` on."""
    row_M = first + tl.arange(0, BLOCK_M)  # int64, like the offsets: rows x features can pass 2**31
    in_rows_M = row_M < end
    token_M = tl.load(token_ptr + tl.minimum(row_M, end - 1))
    n_N = n_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    in_cols_N = n_N < features
    k_K = tl.arange(0, BLOCK_K)
    rows = (end - first).to(tl.int32)
    WIDTH: tl.constexpr = 2 if GATED else 1
    WIDEST: tl.constexpr = PIECE // 2 if BLOCK_N > 128 else PIECE  # a wider accumulator leaves fewer registers
    h = h_ptr
    if AHEAD:
        # Asked for now, H comes while the products are made. Behind a store the compiler cannot know whether a load
        # reads what was stored, and each piece would wait for the memory anew.
        h = _load_h(
            h_ptr, first, rows, n_tile * BLOCK_N * WIDTH, features * WIDTH, BLOCK_M, BLOCK_N * WIDTH, WIDEST * WIDTH
        )  # fmt: skip
    weight_ptr = expert_of(trained_ptr, frozen_ptr, position, num_trained, stride_expert)
    # Before the routing weight: its row-wise product with A is the routing weight's gradient, so the down
    # projection's output is never needed.
    grad_a_MN = multiply(
        grad_out_ptr, row_offsets(token_M, k_K, hidden, WIDE), None, 0,
        weight_ptr, n_N[None, :], k_K[:, None], BLOCK_K, in_cols_N[None, :], n_tile * BLOCK_N, features,
        hidden, stride_out, stride_in,
        scales_ptr, position.to(tl.int64) * stride_scales, values_ptr, scale_columns,
        FORMAT, TRANSPOSED, LAYOUT, False, PRECISION, EVEN_N, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip

    # How many of the tile's rows of dH and of the weighted A are written.
    grad_h_rows = tl.minimum(end - first, tl.load(offsets_ptr + grad_h_positions) - first).to(tl.int32)
    weighted_rows = tl.minimum(end - first, tl.load(offsets_ptr + num_trained) - first).to(tl.int32)
    slot_M = tl.load(slot_ptr + row_M, mask=in_rows_M, other=0)
    weight_M1 = tl.load(weights_ptr + slot_M, mask=in_rows_M, other=0.0).to(tl.float32)[:, None]
    sum_M = _finish(
        grad_a_MN, weight_M1, h, first, rows, grad_h_rows, weighted_rows, n_tile * BLOCK_N,
        grad_h_ptr, weighted_a_ptr, features, AHEAD, BLOCK_M, BLOCK_N, WIDEST, KIND, GATED, SLOPE, LIMIT, UP_OFFSET,
    )  # fmt: skip
    if sums_ptr is not None:
        # A sum per row and tile of F; the tiles are added up afterwards, in order.
        tl.store(sums_ptr + n_tile.to(tl.int64) * num_rows + row_M, sum_M, mask=row_M < end)


@triton.jit(do_not_specialize=["num_rows", "num_positions", "num_trained", "grad_h_positions"])
def _grad_gemm_kernel(
    grad_out_ptr,  # [T, D]
    token_ptr, slot_ptr,  # int64 [N]
    weights_ptr,  # [N] by slot
    trained_ptr, frozen_ptr,  # [S, F, D] and [R, F, D], strided: down projections, transposed
    scales_ptr, values_ptr,  # of frozen weights that are coded, else None
    h_ptr,  # [N, G], columns (gate, up) in turn
    grad_h_ptr,  # [N, G] in the same order, or None
    weighted_a_ptr,  # [N, F], or None
    sums_ptr,  # fp32 [tiles of F, N], or None
    offsets_ptr,  # int64 [P + 1]
    stride_expert, stride_out, stride_in, stride_scales, scale_columns,
    hidden, features, num_rows, num_positions, num_trained, grad_h_positions,
    KIND: tl.constexpr, GATED: tl.constexpr, SLOPE: tl.constexpr, LIMIT: tl.constexpr, UP_OFFSET: tl.constexpr,
    FORMAT: tl.constexpr, TRANSPOSED: tl.constexpr, LAYOUT: tl.constexpr,
    PRECISION: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, WIDE: tl.constexpr, PERSISTENT: tl.constexpr,
    AHEAD: tl.constexpr,
    BLOCK_P: tl.constexpr, GROUP_M: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    if PERSISTENT:
        tiles = count_tiles(features, offsets_ptr, num_positions, BLOCK_M, BLOCK_N)
        for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
            position, first, end, n_tile = find_tile(
                tile, tiles, features, offsets_ptr, num_positions, GROUP_M, BLOCK_M, BLOCK_N, BLOCK_P
            )
            if first < end:
                _make_tile(
                    position, first, end, n_tile,
                    grad_out_ptr, token_ptr, slot_ptr, weights_ptr, trained_ptr, frozen_ptr, scales_ptr, values_ptr,
                    h_ptr, grad_h_ptr, weighted_a_ptr, sums_ptr, offsets_ptr,
                    stride_expert, stride_out, stride_in, stride_scales, scale_columns,
                    hidden, features, num_rows, num_trained, grad_h_positions,
                    KIND, GATED, SLOPE, LIMIT, UP_OFFSET, FORMAT, TRANSPOSED, LAYOUT,
                    PRECISION, EVEN_N, EVEN_K, WIDE, AHEAD, BLOCK_M, BLOCK_N, BLOCK_K,
                )  # fmt: skip
    else:  # without a loop, so that a grid compiles to what it was before there was one
        position, first, end, n_tile = find_tile(
            tl.program_id(0), tl.num_programs(0), features, offsets_ptr, num_positions,
            GROUP_M, BLOCK_M, BLOCK_N, BLOCK_P,
        )  # fmt: skip
        if first >= end:
            return
        _make_tile(
            position, first, end, n_tile,
            grad_out_ptr, token_ptr, slot_ptr, weights_ptr, trained_ptr, frozen_ptr, scales_ptr, values_ptr,
            h_ptr, grad_h_ptr, weighted_a_ptr, sums_ptr, offsets_ptr,
            stride_expert, stride_out, stride_in, stride_scales, scale_columns,
            hidden, features, num_rows, num_trained, grad_h_positions,
            KIND, GATED, SLOPE, LIMIT, UP_OFFSET, FORMAT, TRANSPOSED, LAYOUT,
            PRECISION, EVEN_N, EVEN_K, WIDE, AHEAD, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip


Results = tuple[Tensor | None, Tensor | None, Tensor | None]


def grad_gemm(
    grad_out_TD: Tensor,
    h_NG: Tensor,
    weights_TK: Tensor,
    pools: ExpertPools,
    routing: Routing,
    needs: Needs,
    results: Results | None = None,
    rows_per_expert: int | None = None,
) -> Results:
    """From the output's gradient to everything that the activation's backward yields.

    Args:
        grad_out_TD: contiguous [T, D].
        h_NG: contiguous [N, G], gate and up columns in turn. N may be anything down to the prefix where ``needs`` asks
            for no more than the prefix.
        weights_TK: contiguous [T, K] routing weights.
        results: of a call for other positions, to write to; new memory where they are not given.
        rows_per_expert: what tiles are chosen for; by default what the rows are to the positions.

    Returns:
        grad_h_NG: written for all rows where x needs a gradient, else for the prefix; None where nobody reads it.
        weighted_a_NF: activation times routing weight, written for the prefix; None unless the pool trains.
        sums_NX: fp32 pieces of each row's ``grad_a * a``, to be added up; None unless the weights need a gradient.
    """
    num_rows, hidden, features = h_NG.shape[0], pools.hidden_size, pools.intermediate_size
    everyone, trained = routing.num_experts, routing.num_trained
    positions = everyone if needs.all_rows else trained
    if rows_per_expert is None:
        rows_per_expert = num_rows // max(positions, 1)
    frozen = stack(pools.frozen, "down").mT
    tiles = tiles_for(h_NG, "grad", rows_per_expert, (features, hidden), isinstance(frozen, Coded))
    n_tiles = cdiv(features, tiles.block_n)
    if results is None:
        sums_XN = h_NG.new_empty(n_tiles, num_rows, dtype=torch.float32) if needs.weights else None
        results = (
            torch.empty_like(h_NG) if needs.x or needs.trained else None,
            h_NG.new_empty(num_rows, features) if needs.trained else None,
            None if sums_XN is None else sums_XN.T,
        )
    pointers, strides, coding = weight_operands(pools.trained.down_EDF[:trained].mT, frozen, tiles.descriptors)
    count = max_row_tiles(num_rows, positions, tiles.block_m) * n_tiles
    launch(
        _grad_gemm_kernel[(programs_for(h_NG, tiles, count),)], tiles.descriptors,
        grad_out_TD, routing.token_N, routing.slot_N, weights_TK, *pointers, h_NG, *results, routing.offsets_E1,
        *strides, hidden, features, num_rows, positions, trained, everyone if needs.x else trained,
        **constants(pools.activation), **coding, PERSISTENT=tiles.persistent > 0, AHEAD=tiles.ahead,
        PRECISION=precision(h_NG), EVEN_N=features % tiles.block_n == 0, EVEN_K=hidden % tiles.block_k == 0,
        WIDE=wide(grad_out_TD), BLOCK_P=block_of(positions), **tiles.launch_options(),
    )  # fmt: skip
    return results

"""Triton: rows x expert weights, scattered to the (token, slot) that each row belongs to.

The down projection, and the input gradient of the up projection.
"""

# Launches take more than the kernel signature that triton.jit passes on to the type checker.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from esft_kernels.triton_ops.decode import Coded, weight_operands
from esft_kernels.triton_ops.descriptors import aligned, launch, rows_descriptor
from esft_kernels.triton_ops.mainloop import (
    block_of,
    count_tiles,
    expert_of,
    find_tile,
    multiply,
    precision,
    row_offsets,
    weight_row,
)
from esft_kernels.triton_ops.tiles import cdiv, max_row_tiles, programs_for, tiles_for


@triton.jit
def _make_tile(
    position, first, end, n_tile,
    rows_ptr, slot_ptr, weights_ptr, trained_ptr, frozen_ptr, scales_ptr, values_ptr,
    trained_bias_ptr, frozen_bias_ptr, out_ptr, stride_expert, stride_out, stride_in, stride_scales, scale_columns,
    in_features, out_features, num_trained,
    FORMAT: tl.constexpr, TRANSPOSED: tl.constexpr, LAYOUT: tl.constexpr, ROW_TILES: tl.constexpr,
    PAIRED: tl.constexpr, PRECISION: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Make a tile of the result, of one expert's rows from ``first`` on."""
    m_M = tl.arange(0, BLOCK_M)
    row_M = first + m_M  # int64, like the offsets: rows x features can pass 2**31
    n_N = n_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    in_cols_N = n_N < out_features
    k_K = tl.arange(0, BLOCK_K)
    weight_ptr = expert_of(trained_ptr, frozen_ptr, position, num_trained, stride_expert)
    # A block of (gate, up) columns is half a block of gate rows and half a block of up rows.
    in_step = BLOCK_K // 2 if PAIRED else BLOCK_K
    in_K = weight_row(k_K, in_features // 2, PAIRED)
    row_tiles = None
    if ROW_TILES:
        row_tiles = rows_descriptor(rows_ptr, end, in_features, BLOCK_M, BLOCK_K)
    acc_MN = multiply(
        rows_ptr + first * in_features,
        row_offsets(tl.minimum(m_M, end - first - 1), k_K, in_features, False), row_tiles, first.to(tl.int32),
        weight_ptr, n_N[None, :], in_K[:, None], in_step, in_cols_N[None, :], n_tile * BLOCK_N, out_features,
        in_features, stride_out, stride_in,
        scales_ptr, position.to(tl.int64) * stride_scales, values_ptr, scale_columns,
        FORMAT, TRANSPOSED, LAYOUT, PAIRED, PRECISION, EVEN_N, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if trained_bias_ptr is not None:
        bias_ptr = expert_of(trained_bias_ptr, frozen_bias_ptr, position, num_trained, out_features)
        acc_MN += tl.load(bias_ptr + n_N, mask=in_cols_N, other=0.0).to(tl.float32)[None, :]
    slot_M = tl.load(slot_ptr + row_M, mask=row_M < end, other=0)
    if weights_ptr is not None:
        acc_MN *= tl.load(weights_ptr + slot_M, mask=row_M < end, other=0.0).to(tl.float32)[:, None]
    out_ptr_MN = out_ptr + slot_M[:, None] * out_features + n_N[None, :]
    mask_MN = (row_M < end)[:, None] & in_cols_N[None, :]
    tl.store(out_ptr_MN, acc_MN.to(out_ptr.dtype.element_ty), mask=mask_MN)


@triton.jit(do_not_specialize=["num_positions", "num_trained"])
def _grouped_gemm_kernel(
    rows_ptr,  # [N, I]
    slot_ptr,  # int64 [N]
    weights_ptr,  # [N] by slot, or None
    trained_ptr, frozen_ptr,  # [S, O, I] and [R, O, I], strided
    scales_ptr, values_ptr,  # of frozen weights that are coded, else None
    trained_bias_ptr, frozen_bias_ptr,  # [S, O] and [R, O], or None
    out_ptr,  # [N, O] by slot
    offsets_ptr,  # int64 [P + 1]
    stride_expert, stride_out, stride_in, stride_scales, scale_columns,
    in_features, out_features, num_positions, num_trained,
    FORMAT: tl.constexpr, TRANSPOSED: tl.constexpr, LAYOUT: tl.constexpr, ROW_TILES: tl.constexpr, PAIRED: tl.constexpr,
    PRECISION: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, PERSISTENT: tl.constexpr,
    BLOCK_P: tl.constexpr, GROUP_M: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    if PERSISTENT:
        tiles = count_tiles(out_features, offsets_ptr, num_positions, BLOCK_M, BLOCK_N)
        for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
            position, first, end, n_tile = find_tile(
                tile, tiles, out_features, offsets_ptr, num_positions, GROUP_M, BLOCK_M, BLOCK_N, BLOCK_P
            )
            if first < end:
                _make_tile(
                    position, first, end, n_tile,
                    rows_ptr, slot_ptr, weights_ptr, trained_ptr, frozen_ptr, scales_ptr, values_ptr,
                    trained_bias_ptr, frozen_bias_ptr, out_ptr, stride_expert, stride_out, stride_in, stride_scales,
                    scale_columns,
                    in_features, out_features, num_trained,
                    FORMAT, TRANSPOSED, LAYOUT, ROW_TILES, PAIRED, PRECISION, EVEN_N, EVEN_K,
                    BLOCK_M, BLOCK_N, BLOCK_K,
                )  # fmt: skip
    else:  # without a loop, so that a grid compiles to what it was before there was one
        position, first, end, n_tile = find_tile(
            tl.program_id(0), tl.num_programs(0), out_features, offsets_ptr, num_positions,
            GROUP_M, BLOCK_M, BLOCK_N, BLOCK_P,
        )  # fmt: skip
        if first >= end:
            return
        _make_tile(
            position, first, end, n_tile,
            rows_ptr, slot_ptr, weights_ptr, trained_ptr, frozen_ptr, scales_ptr, values_ptr,
            trained_bias_ptr, frozen_bias_ptr, out_ptr, stride_expert, stride_out, stride_in, stride_scales,
            scale_columns,
            in_features, out_features, num_trained,
            FORMAT, TRANSPOSED, LAYOUT, ROW_TILES, PAIRED, PRECISION, EVEN_N, EVEN_K,
            BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip


def grouped_gemm(
    rows_NI: Tensor,
    slot_N: Tensor,
    trained_SOI: Tensor,
    frozen_ROI: Tensor | Coded,
    offsets_P1: Tensor,
    weights_TK: Tensor | None = None,
    biases: tuple[Tensor | None, Tensor | None] = (None, None),
    paired: bool = False,
    out_NO: Tensor | None = None,
    rows_per_expert: int | None = None,
) -> Tensor:
    """``(rows[e] @ weight(e).T + bias(e)) * weight`` for positions 0..P-1, [N, O] by slot.

    Args:
        rows_NI: contiguous [N, I].
        slot_N: int64 [N], row -> slot: row n of the result stands at ``slot_N[n]``.
        trained_SOI, frozen_ROI: weights of positions 0..S-1 and S.., with the same strides; coded ones where S = 0.
        offsets_P1: contiguous int64 [P + 1], a routing's; output rows past the last are left unwritten.
        weights_TK: contiguous routing weights of every slot, or None for ones.
        biases: contiguous [S, O] and [R, O], or None.
        paired: the columns of ``rows`` are (gate, up) in turn, and the weights have all gates first.
        out_NO: where to write, contiguous; new memory where it is not given.
        rows_per_expert: what tiles are chosen for; by default what all rows are to these experts.
    """
    (num_trained, out_features, in_features), num_positions = trained_SOI.shape, offsets_P1.numel() - 1
    num_rows = rows_NI.shape[0]
    if out_NO is None:
        out_NO = rows_NI.new_empty(num_rows, out_features)
    if rows_per_expert is None:
        rows_per_expert = num_rows // max(num_positions, 1)
    tiles = tiles_for(rows_NI, "gemm", rows_per_expert, (out_features, in_features), isinstance(frozen_ROI, Coded))
    pointers, strides, coding = weight_operands(trained_SOI, frozen_ROI, tiles.descriptors, "in" if paired else None)
    count = max_row_tiles(num_rows, num_positions, tiles.block_m) * cdiv(out_features, tiles.block_n)
    launch(
        _grouped_gemm_kernel[(programs_for(rows_NI, tiles, count),)], tiles.descriptors,
        rows_NI, slot_N, weights_TK, *pointers, *biases, out_NO, offsets_P1,
        *strides, in_features, out_features, num_positions, num_trained, **coding,
        PAIRED=paired, ROW_TILES=coding["LAYOUT"] is not None and aligned(rows_NI), PERSISTENT=tiles.persistent > 0,
        PRECISION=precision(rows_NI), EVEN_N=out_features % tiles.block_n == 0,
        EVEN_K=in_features % tiles.block_k == 0, BLOCK_P=block_of(num_positions), **tiles.launch_options(),
    )  # fmt: skip
    return out_NO

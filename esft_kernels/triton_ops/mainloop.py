"""Triton: what the GEMM kernels share: finding a row tile, an expert's weights, the loop over the reduction."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from esft_kernels.triton_ops import tiles
from esft_kernels.triton_ops.decode import PLAIN, load_weight
from esft_kernels.triton_ops.descriptors import load_weight_tile, weight_descriptor


@triton.jit
def find_row_tile(tile, offsets_ptr, num_positions, BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr):
    """Expert position, first row and last row + 1 of a row tile; see ``tiles.tile_schedule``.

    A tile past the last expert has position ``num_positions`` and no rows.
    """
    pos_P = tl.arange(0, BLOCK_P)
    end_P = tl.load(offsets_ptr + 1 + pos_P, mask=pos_P < num_positions, other=0)
    tile += tl.load(offsets_ptr) // BLOCK_M
    passed_P = (pos_P < num_positions) & (end_P // BLOCK_M + pos_P + 1 <= tile)
    position = tl.sum(passed_P.to(tl.int32), axis=0)
    start = tl.load(offsets_ptr + position)
    end = tl.load(offsets_ptr + position + 1, mask=position < num_positions, other=0)
    return position, start + (tile - start // BLOCK_M - position) * BLOCK_M, end


@triton.jit
def count_tiles(columns, offsets_ptr, num_positions, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """How many tiles an [N, columns] product has: those of ``tiles.max_row_tiles``, for the rows that there are."""
    m_tiles = tl.load(offsets_ptr + num_positions) // BLOCK_M + num_positions - tl.load(offsets_ptr) // BLOCK_M
    return m_tiles.to(tl.int32) * tl.cdiv(columns, BLOCK_N)


@triton.jit
def find_tile(
    tile, tiles, columns, offsets_ptr, num_positions,
    GROUP_M: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Where a tile of an [N, columns] product is: ``find_row_tile`` and the number of the column tile.

    GROUP_M row tiles go through the columns together, so that they find each other's weights in the cache.
    """
    n_tiles = tl.cdiv(columns, BLOCK_N)
    m_tiles = tiles // n_tiles
    m_tile, n_tile = tl.swizzle2d(tile // n_tiles, tile % n_tiles, m_tiles, n_tiles, GROUP_M)
    position, first, end = find_row_tile(m_tile, offsets_ptr, num_positions, BLOCK_M, BLOCK_P)
    return position, first, end, n_tile


@triton.jit
def expert_of(trained_ptr, frozen_ptr, position, num_trained, stride_expert):
    """Where the expert at a position begins; both pools have the same strides.

    Selected, not branched to: a pointer out of an ``if`` does not always compile for AMD (Triton 3.9).
    """
    ours = position < num_trained
    base = tl.where(ours, trained_ptr, frozen_ptr)
    return base + tl.where(ours, position, position - num_trained).to(tl.int64) * stride_expert


@triton.jit
def weight_row(column, features, PAIRED: tl.constexpr):
    """The row of gate_up that makes a column of H.

    The columns of H are (gate, up) in turn, whatever the order of the weights: a tile then holds both halves of what
    it activates, and its loads and stores are one contiguous piece. PAIRED where the weights have all gates first.
    """
    if PAIRED:
        row = (column % 2) * features + column // 2
    else:
        row = column
    return row


@triton.jit
def row_offsets(row_M, k_K, features, WIDE: tl.constexpr):
    """Offsets [M, K] of whole rows; 64-bit ones only where 32 bits do not reach every element, see ``wide``."""
    if not WIDE:
        row_M = row_M.to(tl.int32)
    return row_M[:, None] * features + k_K[None, :]


def wide(*tensors: Tensor) -> bool:
    """Whether an element of one of the tensors is past what 32-bit offsets reach."""
    return any(tensor.numel() >= 2**31 for tensor in tensors)


@triton.jit
def multiply(
    rows_ptr, row_offset_MK, row_tiles, first_row,
    weight_ptr, out_1N, in_K1, in_step, in_cols_1N, first_column, out_features,
    in_features, stride_out, stride_in, scales_ptr, first_scale, values_ptr, scale_columns,
    FORMAT: tl.constexpr, TRANSPOSED: tl.constexpr, LAYOUT: tl.constexpr, PAIRED: tl.constexpr,
    PRECISION: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``rows @ weight`` over ``in_features``, fp32 [M, N].

    ``out_1N`` and ``in_K1`` are where the weight has the tile's columns and the first BLOCK_K features; ``in_step``
    leads to the next ones. Of a FORMAT the weights are decoded here, with scales from ``first_scale`` on, and a row of
    codes is ``stride_out`` long, or ``stride_in`` where TRANSPOSED: where the matrix that was quantized is [in, out].
    With a LAYOUT a descriptor loads the weights from ``first_column`` on, of ``out_features``, and where ``row_tiles``
    is one, it loads rows from ``first_row`` on.

    The loop moves two scalar bases past offsets that stay: pointers of every element would each be added to in every
    turn. Rows are never masked: the caller points rows past an expert's end at its last row, and drops them at the
    store.
    """
    acc_MN = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    k_K = tl.arange(0, BLOCK_K)
    if scales_ptr is not None:
        scales_ptr += first_scale
    weight_offset_KN = in_K1 * stride_in + out_1N * stride_out  # within an expert 32-bit offsets do
    if LAYOUT is not None:
        weight_tiles = weight_descriptor(
            weight_ptr, out_features, in_features, stride_out, stride_in, LAYOUT, PAIRED, BLOCK_N, BLOCK_K
        )
    for k in range(0, in_features, BLOCK_K):
        in_k_K = k_K < in_features - k
        if row_tiles is not None:
            rows_MK = row_tiles.load([first_row, k])
        elif FORMAT == PLAIN and EVEN_K:
            rows_MK = tl.load(rows_ptr + row_offset_MK)
        else:
            # Both sides are zero past the last input feature: a zero alone would not silence a NaN on the other.
            rows_MK = tl.load(rows_ptr + row_offset_MK, mask=in_k_K[None, :], other=0.0)
        if FORMAT != PLAIN:
            mask_KN = in_k_K[:, None] & in_cols_1N
            if TRANSPOSED:
                decoded_KN = load_weight(
                    weight_ptr, scales_ptr, values_ptr, in_K1, out_1N, stride_in, scale_columns, mask_KN, FORMAT
                )  # fmt: skip
            else:
                decoded_KN = load_weight(
                    weight_ptr, scales_ptr, values_ptr, out_1N, in_K1, stride_out, scale_columns, mask_KN, FORMAT
                )  # fmt: skip
            in_K1 += in_step
            weight_KN = decoded_KN.to(rows_ptr.dtype.element_ty)
        elif LAYOUT is not None:
            weight_KN = load_weight_tile(weight_tiles, first_column, k, LAYOUT, PAIRED, BLOCK_N, BLOCK_K)
        elif EVEN_K and EVEN_N:
            weight_KN = tl.load(weight_ptr + weight_offset_KN)
        elif EVEN_K:
            weight_KN = tl.load(weight_ptr + weight_offset_KN, mask=in_cols_1N, other=0.0)
        else:
            weight_KN = tl.load(weight_ptr + weight_offset_KN, mask=in_k_K[:, None] & in_cols_1N, other=0.0)
        acc_MN = dot(rows_MK, weight_KN, acc_MN, PRECISION)
        rows_ptr += BLOCK_K
        if FORMAT == PLAIN:
            weight_ptr += in_step * stride_in
    return acc_MN


@triton.jit
def dot(a_MK, b_KN, acc_MN, PRECISION: tl.constexpr):
    """Matrix product on top of an fp32 accumulator; see ``precision``."""
    if PRECISION == "cast":
        acc_MN = tl.dot(a_MK.to(tl.float32), b_KN.to(tl.float32), acc_MN, input_precision="ieee")
    else:
        acc_MN = tl.dot(a_MK, b_KN, acc_MN, input_precision=PRECISION)
    return acc_MN


@triton.jit
def halves(x_MN, M: tl.constexpr, N: tl.constexpr):
    """The left and the right half of the columns."""
    return tl.split(tl.permute(tl.reshape(x_MN, (M, 2, N // 2)), (0, 2, 1)))


def precision(rows: Tensor) -> str:
    """How products are taken: ``ieee``, or ``tf32`` for fp32 where PyTorch's setting allows to lose 13 bits of them.

    AMD's gfx942 has tf32, its other GPUs have not.

    Triton's interpreter keeps bf16 as bare bits and would multiply those as integers: there, operands are ``cast`` to
    fp32 first. The product of two 16-bit floats is exact in fp32, so the result is the one that the hardware gives.
    """
    if rows.device.type == "cpu":
        return "cast"
    if rows.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32" if tiles.device_arch(rows.device).startswith(("sm_", "gfx942")) else "ieee"
    return "ieee"


def block_of(count: int) -> int:
    """The smallest power of two that holds ``count``; 256 at least, which nearly every model fits: fewer variants.

    A program reads that many offsets once, 2 KB, before the hundreds of KB of its main loop.
    """
    return tiles.next_power_of_2(max(count, 256))

"""Triton: quantized weights, decoded where they are loaded or into a scratch of a few experts.

Both ways give the bits of ``Format.decode``. Where a GEMM loads them, weights are taken one by one, in whatever order
its tile wants them. Into the scratch go blocks, as they lie in memory: codes and weights move in whole vectors.
"""

# Launches take more than the kernel signature that triton.jit passes on to the type checker.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from esft_kernels.formats import fp8, int8, mxfp4, nf4
from esft_kernels.formats.nf4 import Nf4
from esft_kernels.pools import PLAIN as _PLAIN
from esft_kernels.pools import ExpertWeights, Projection, QuantizedWeights
from esft_kernels.triton_ops.descriptors import weight_layout

PLAIN = tl.constexpr(_PLAIN)
# Neighbours in a row that share a scale.
BLOCKS = {"int8": int8.GROUP, "nf4": nf4.BLOCK, "fp8": fp8.BLOCK, "mxfp4": mxfp4.BLOCK}
TILE = 4096  # weights that a program decodes: 16 bytes of 4-bit codes for each thread
E4M3_BIAS, E2M1_BIAS = tl.constexpr(2.0**120), tl.constexpr(2.0**126)  # a float's above that of so small ones


@triton.jit
def load_weight(codes_ptr, scales_ptr, values_ptr, row, column, columns, scale_columns, mask, FORMAT: tl.constexpr):
    """float32 weights of one expert's matrix at some rows and columns, which broadcast; zeros where masked.

    Every weight reads its own byte and scale: its neighbours' are the same, and in the cache. The sixteen values of nf4
    are one line of it: choosing among constants takes twenty instructions, and the registers.
    """
    if FORMAT == "int8":
        value = tl.load(codes_ptr + row * (scale_columns * 64) + column, mask=mask, other=0).to(tl.float32)
        scale = tl.load(scales_ptr + row * scale_columns + (column >> 6), mask=mask, other=0.0)
    elif FORMAT == "fp8":
        value = e4m3(tl.load(codes_ptr + row * columns + column, mask=mask, other=0))
        scale = tl.load(scales_ptr + (row >> 7) * scale_columns + (column >> 7), mask=mask, other=0.0)
    elif FORMAT == "mxfp4":
        byte = tl.load(codes_ptr + row * (scale_columns * 16) + (column >> 1), mask=mask, other=0)
        value = e2m1(byte.to(tl.int32) << (28 - ((column & 1) << 2)))
        scale = e8m0(tl.load(scales_ptr + row * scale_columns + (column >> 5), mask=mask, other=0))
    else:
        tl.static_assert(FORMAT == "nf4")
        place = row * columns + column
        byte = tl.load(codes_ptr + (place >> 1), mask=mask, other=0)
        value = tl.load(values_ptr + ((byte >> (4 - ((place & 1) << 2)).to(tl.uint8)) & 15))
        scale = tl.load(scales_ptr + (place >> 6), mask=mask, other=0.0)
    return value * scale


@triton.jit
def e4m3(code):
    """8-bit floats: bit operations, for not every GPU has the conversion.

    Shifted, they are float32's bits but for the exponent's bias, subnormal ones too. Copies of the sign are cut off.
    """
    bits = (code.to(tl.int8, bitcast=True).to(tl.int32) << 20) & -0x78100000
    value = bits.to(tl.float32, bitcast=True) * E4M3_BIAS
    return tl.where(tl.abs(value) == 480, float("nan"), value)


@triton.jit
def e2m1(bits):
    """4-bit floats in the high bits of int32, in the same way."""
    return ((bits >> 6) & -0x7E400000).to(tl.float32, bitcast=True) * E2M1_BIAS


@triton.jit
def e8m0(code):
    """Powers of two; the smallest is subnormal."""
    return tl.maximum(code.to(tl.int32) << 23, 1 << 22).to(tl.float32, bitcast=True)


@triton.jit
def _decode_kernel(
    codes_ptr,  # of the first expert: bytes, as the format lays them out
    scales_ptr,
    values_ptr,  # [16] of nf4, or None
    out_ptr,  # [experts, size]
    stride_codes, stride_scales, size, columns, row_blocks,
    FORMAT: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One block of each of ROWS rows. Masks are alike along a whole vector: else it would be taken apart.

    What is not loaded may be anything: it is not stored.
    """
    expert = tl.program_id(1).to(tl.int64)
    codes_ptr += expert * stride_codes
    scales_ptr += expert * stride_scales
    row = (tl.program_id(0) // row_blocks * ROWS + tl.arange(0, ROWS))[:, None]
    row_block = tl.program_id(0) % row_blocks
    block = row * row_blocks + row_block
    exists = row * columns + row_block * BLOCK < size
    column = row_block * BLOCK + tl.arange(0, BLOCK)[None, :]
    place = row * columns + column
    mask = (column < columns) & (place < size)
    if FORMAT == "int8":
        value = tl.load(codes_ptr + block * BLOCK + tl.arange(0, BLOCK)[None, :], mask=exists).to(tl.float32)
        scale = tl.load(scales_ptr + block, mask=exists)
    elif FORMAT == "fp8":
        value = e4m3(tl.load(codes_ptr + place, mask=mask))
        scale = tl.load(scales_ptr + (row >> 7) * row_blocks + row_block, mask=exists)
    else:
        pair = block * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
        byte = tl.load(codes_ptr + pair, mask=exists).to(tl.int32)
        if FORMAT == "mxfp4":
            value = e2m1(tl.join(byte << 28, byte << 24).reshape(ROWS, BLOCK))
            scale = e8m0(tl.load(scales_ptr + block, mask=exists))
        else:
            tl.static_assert(FORMAT == "nf4")
            code = tl.join(byte >> 4, byte & 15).reshape(ROWS * BLOCK)
            value = tl.gather(tl.load(values_ptr + tl.arange(0, 16)), code, 0).reshape(ROWS, BLOCK)
            scale = tl.load(scales_ptr + block, mask=exists)
    tl.store(out_ptr + expert * size + place, (value * scale).to(out_ptr.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class Coded:
    """A stack of matrices that kernels decode as they load them; has of a tensor [E, O, I] what launches ask for.

    Attributes:
        codes: uint8, or int8 where that is what they are.
        scales: float32, or uint8 exponents.
        values: float32 [16] of nf4's codes, else None.
        columns: of the matrix that was quantized.
        scale_columns: how many scales a row of blocks has; 0 where blocks run over the ends of rows.
        format: one that ``load_weight`` knows.
        transposed: whether the matrices are meant as [in, out].
    """

    codes: Tensor
    scales: Tensor
    values: Tensor | None
    columns: int
    scale_columns: int
    format: str
    transposed: bool = False

    @property
    def mT(self) -> Coded:
        return replace(self, transposed=not self.transposed)


def coded(pool: QuantizedWeights, projection: Projection) -> Coded:
    """A pool's stack as the kernels read it. Scales in 8 bits are written out in float32: an eighth of the codes."""
    codes, scales, *_ = tensors = pool.stack(projection)
    columns = pool.size(projection)[1]
    if isinstance(pool.kind, Nf4):
        return Coded(codes, pool.kind.scales(tensors), _values(codes.device), columns, 0, "nf4")
    codes = codes if codes.dtype == torch.int8 else codes.view(torch.uint8)
    return Coded(codes, scales, None, columns, scales.shape[2], pool.format)


@cache
def _values(device: torch.device) -> Tensor:
    return torch.tensor(nf4.VALUES, dtype=torch.float32, device=device)


def stack(pool: ExpertWeights | QuantizedWeights, projection: Projection) -> Tensor | Coded:
    """A pool's matrices [E, O, I]."""
    if isinstance(pool, QuantizedWeights):
        return coded(pool, projection)
    return pool.gate_up_EGD if projection == "gate_up" else pool.down_EDF


def weight_operands(
    trained_SOI: Tensor, frozen: Tensor | Coded, descriptors: bool = False, paired: Literal["out", "in"] | None = None
) -> tuple[tuple, tuple, dict]:
    """What a kernel takes for its weights: pointers, then strides and sizes, then constants.

    Pointers of trained and frozen weights, of scales and values; strides of an expert, of output and input features, of
    an expert's scales, and ``scale_columns``. Coded weights are alone in a launch, without trained ones. Plain ones are
    loaded by ``descriptors`` where these can, see ``weight_layout``.
    """
    if isinstance(frozen, Tensor):
        strides = (trained_SOI if len(trained_SOI) else frozen).stride()
        layout = weight_layout(trained_SOI, frozen, paired) if descriptors else None
        constants = {"FORMAT": PLAIN.value, "TRANSPOSED": False, "LAYOUT": layout}
        return (trained_SOI, frozen, None, None), (*strides, 0, 0), constants
    codes, scales = frozen.codes, frozen.scales
    row = (1, frozen.columns) if frozen.transposed else (frozen.columns, 1)
    sizes = (codes.stride(0), *row, scales.stride(0), frozen.scale_columns)
    constants = {"FORMAT": frozen.format, "TRANSPOSED": frozen.transposed, "LAYOUT": None}
    return (codes, codes, scales, frozen.values), sizes, constants


def decode(pool: QuantizedWeights, projection: Projection, first: int, out_EOI: Tensor) -> None:
    """Fill a contiguous [E, O, I] with the matrices of the pool's experts from ``first`` on."""
    source = coded(pool, projection)
    experts, rows, columns = out_EOI.shape
    size, block = rows * columns, BLOCKS[source.format]
    if source.format == "nf4" or (source.format != "fp8" and columns % block == 0):
        rows, columns = triton.cdiv(size, block), block  # a block a row: they follow each other without gaps
    row_blocks = triton.cdiv(columns, block)
    _decode_kernel[triton.cdiv(rows, TILE // block) * row_blocks, experts](
        source.codes[first:], source.scales[first:], source.values, out_EOI,
        source.codes.stride(0), source.scales.stride(0), size, columns, row_blocks,
        FORMAT=source.format, BLOCK=block, ROWS=TILE // block,
    )  # fmt: skip

"""Triton: quantized weights, decoded where they are loaded or into a scratch of a few experts.

One function of a row, a column and a format, so that both ways give the same bits; and those are ``Format.decode``'s.
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

from esft_kernels.formats import mxfp4, nf4
from esft_kernels.formats.nf4 import Nf4
from esft_kernels.pools import PLAIN as _PLAIN
from esft_kernels.pools import ExpertWeights, Projection, QuantizedWeights
from esft_kernels.triton_ops.descriptors import weight_layout

PLAIN = tl.constexpr(_PLAIN)
BLOCK_O, BLOCK_I = 16, 128


@triton.jit
def load_weight(codes_ptr, scales_ptr, values_ptr, row, column, columns, scale_columns, mask, FORMAT: tl.constexpr):
    """float32 weights of one expert's matrix at some rows and columns, which broadcast; zeros where masked.

    Every weight reads its own byte and scale: its neighbours' are the same, and in the cache. The sixteen values of
    4-bit codes are one line of it: choosing among constants takes twenty instructions, and the registers.
    """
    if FORMAT == "int8":
        value = tl.load(codes_ptr + row * (scale_columns * 64) + column, mask=mask, other=0).to(tl.float32)
        scale = tl.load(scales_ptr + row * scale_columns + (column >> 6), mask=mask, other=0.0)
    elif FORMAT == "fp8":
        value = e4m3(tl.load(codes_ptr + row * columns + column, mask=mask, other=0))
        scale = tl.load(scales_ptr + (row >> 7) * scale_columns + (column >> 7), mask=mask, other=0.0)
    elif FORMAT == "mxfp4":
        byte = tl.load(codes_ptr + row * (scale_columns * 16) + (column >> 1), mask=mask, other=0)
        value = tl.load(values_ptr + ((byte >> ((column & 1) << 2).to(tl.uint8)) & 15))
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
    """8-bit floats: bit operations, for not every GPU has the conversion."""
    size = code.to(tl.int32) & 127
    normal = ((size << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    value = tl.where(size < 8, size.to(tl.float32) * 0.001953125, normal)
    value = tl.where(size == 127, float("nan"), value)
    return tl.where(code >= 128, -value, value)


@triton.jit
def e8m0(code):
    """Powers of two; the smallest is subnormal."""
    return tl.maximum(code.to(tl.int32) << 23, 1 << 22).to(tl.float32, bitcast=True)


@triton.jit
def _decode_kernel(
    codes_ptr,  # of the first expert: bytes, as the format lays them out
    scales_ptr,
    values_ptr,  # [16] of 4-bit codes, or None
    out_ptr,  # [experts, rows, columns]
    stride_codes, stride_scales, rows, columns, scale_columns,
    FORMAT: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(1).to(tl.int64)
    i_tiles = tl.cdiv(columns, BLOCK_I)
    row = (tl.program_id(0) // i_tiles * BLOCK_O + tl.arange(0, BLOCK_O))[:, None]
    column = (tl.program_id(0) % i_tiles * BLOCK_I + tl.arange(0, BLOCK_I))[None, :]
    mask = (row < rows) & (column < columns)
    codes_ptr += expert * stride_codes
    scales_ptr += expert * stride_scales
    weight = load_weight(codes_ptr, scales_ptr, values_ptr, row, column, columns, scale_columns, mask, FORMAT)
    out_ptr += expert * rows.to(tl.int64) * columns
    tl.store(out_ptr + row * columns + column, weight.to(out_ptr.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class Coded:
    """A stack of matrices that kernels decode as they load them; has of a tensor [E, O, I] what launches ask for.

    Attributes:
        codes: uint8, or int8 where that is what they are.
        scales: float32, or uint8 exponents.
        values: float32 [16] of 4-bit codes, else None.
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
        return Coded(codes, pool.kind.scales(tensors), _values(nf4.VALUES, codes.device), columns, 0, "nf4")
    values = _values(mxfp4.VALUES, codes.device) if pool.format == "mxfp4" else None
    codes = codes if codes.dtype == torch.int8 else codes.view(torch.uint8)
    return Coded(codes, scales, values, columns, scales.shape[2], pool.format)


@cache
def _values(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)


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
    grid = (triton.cdiv(rows, BLOCK_O) * triton.cdiv(columns, BLOCK_I), experts)
    _decode_kernel[grid](
        source.codes[first:], source.scales[first:], source.values, out_EOI,
        source.codes.stride(0), source.scales.stride(0), rows, columns, source.scale_columns,
        FORMAT=source.format, BLOCK_O=BLOCK_O, BLOCK_I=BLOCK_I,
    )  # fmt: skip

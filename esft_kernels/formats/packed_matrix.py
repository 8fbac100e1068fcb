"""A frozen matrix of a linear layer or an embedding in few bits, whose rows can be decoded one by one.

Of the formats, those whose blocks lie within a row: int8, and nf4 with every row padded to whole blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from esft_kernels.formats import int8, nf4
from esft_kernels.formats.format import Stored, blocks_of
from esft_kernels.formats.resolve import FORMATS

ROW_FORMATS = {"int8": int8.GROUP, "nf4": nf4.BLOCK}  # and the columns of a block
STRIP = 2048  # rows that are encoded together: in float32 a whole embedding would take more than it saves


def layout(format_name: str, rows: int, columns: int) -> dict[str, Stored]:
    """The tensors that keep a matrix, by name; the first dimension is rows.

    Raises ValueError for a format whose blocks are not within rows.
    """
    width = _width(format_name, columns)
    whole = FORMATS[format_name].layout(1, 1, width)
    return {name: Stored((rows, stored.shape[-1]), stored.dtype) for name, stored in whole.items()}


def nbytes(format_name: str, rows: int, columns: int) -> int:
    """Bytes that a matrix takes. Raises ValueError as ``layout`` does."""
    return FORMATS[format_name].nbytes(1, rows, _width(format_name, columns))


@torch.no_grad()
def encode(format_name: str, weight_OI: Tensor, parts: Sequence[Tensor]) -> None:
    """Write a matrix of any float dtype to tensors of ``layout``. Raises ValueError where it is not finite."""
    surplus = _width(format_name, weight_OI.shape[1]) - weight_OI.shape[1]
    for first in range(0, weight_OI.shape[0], STRIP):
        strip = F.pad(weight_OI[first : first + STRIP], (0, surplus))
        if not strip.isfinite().all():
            raise ValueError(f"{format_name}: weights are not finite")
        for whole, part in zip(parts, FORMATS[format_name].encode(strip.float()), strict=True):
            whole[first : first + STRIP] = part.view(strip.shape[0], -1)


def decode(format_name: str, parts: Sequence[Tensor], columns: int, dtype: torch.dtype) -> Tensor:
    """The matrix [rows, columns] of such tensors, or of some of their rows."""
    kind, rows, width = FORMATS[format_name], parts[0].shape[0], _width(format_name, columns)
    out = torch.empty(kind.buffer_size(rows, width), dtype=dtype, device=parts[0].device)
    return kind.decode([part.reshape(-1) for part in parts], rows, width, out)[:, :columns]


def packed_linear(x: Tensor, parts: Sequence[Tensor], bias_O: Tensor | None, format_name: str) -> Tensor:
    """``F.linear`` with a frozen matrix [O, I] in a format, decoded for the forward and again for the backward.

    Args:
        x: [..., I], of the dtype that is computed in.
        parts: the matrix, as ``layout`` has it.
        bias_O: of x's dtype, and frozen as well.
        format_name: one of ``ROW_FORMATS``.

    Returns [..., O]; x alone gets a gradient.
    """
    return _PackedLinear.apply(x, bias_O, format_name, *parts)  # pyright: ignore[reportReturnType]


class _PackedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, format_name, *parts):  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(*parts)
        ctx.format_name, ctx.columns = format_name, x.shape[-1]
        return F.linear(x, decode(format_name, parts, x.shape[-1], x.dtype), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out):  # pyright: ignore[reportIncompatibleMethodOverride]
        parts = ctx.saved_tensors
        weight_OI = decode(ctx.format_name, parts, ctx.columns, grad_out.dtype)
        return grad_out @ weight_OI, None, None, *(None,) * len(parts)


def _width(format_name: str, columns: int) -> int:
    """Columns with the padding of the last block."""
    if format_name not in ROW_FORMATS:
        raise ValueError(f"a matrix is kept in one of {', '.join(ROW_FORMATS)}, got {format_name!r}")
    block = ROW_FORMATS[format_name]
    return blocks_of(columns, block) * block

"""Every format's definition in float64, weight by weight: which code, which scale, and their product."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from esft_kernels.formats import mxfp4, nf4


def _int8(parts: Sequence[Tensor], row: Tensor, column: Tensor, columns: int) -> Tensor:
    codes, scales = parts
    return codes[row, column].double() * scales[row, column // 64].double()


def _nibble(byte: Tensor, high: Tensor) -> Tensor:
    return torch.where(high, byte >> 4, byte & 15).long()


def _nf4(parts: Sequence[Tensor], row: Tensor, column: Tensor, columns: int) -> Tensor:
    codes, absmax = parts
    n = row * columns + column
    values = torch.tensor(nf4.VALUES, dtype=torch.float32).double()
    return values[_nibble(codes[n // 2], n % 2 == 0)] * absmax[n // 64].double()


def _nf4_double(parts: Sequence[Tensor], row: Tensor, column: Tensor, columns: int) -> Tensor:
    codes, absmax, scales, mean = parts
    block = torch.arange(len(absmax))
    return _nf4((codes, absmax.double() * scales[block // 256].double() + mean.double()), row, column, columns)


def _fp8(parts: Sequence[Tensor], row: Tensor, column: Tensor, columns: int) -> Tensor:
    codes, scales = parts
    return codes.double()[row, column] * scales[row // 128, column // 128].double()


def _mxfp4(parts: Sequence[Tensor], row: Tensor, column: Tensor, columns: int) -> Tensor:
    blocks, scales = parts
    byte = blocks[row, column // 32, column % 32 // 2]
    values = torch.tensor(mxfp4.VALUES, dtype=torch.float64)
    return values[_nibble(byte, column % 2 == 1)] * 2.0 ** (scales[row, column // 32].double() - 127)


TWINS: dict[str, Callable[..., Tensor]] = {
    "int8": _int8, "nf4": _nf4, "nf4_double": _nf4_double, "fp8": _fp8, "mxfp4": _mxfp4,
}  # fmt: skip


def exact(name: str, parts: Sequence[Tensor], rows: int, columns: int) -> Tensor:
    """float64 [rows, columns] of one expert's tensors."""
    row, column = torch.arange(rows)[:, None], torch.arange(columns)[None, :]
    return TWINS[name](parts, row, column, columns)

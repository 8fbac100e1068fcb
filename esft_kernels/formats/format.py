"""What a format of few bits is: how a stack of matrices [E, O, I] is laid out, written and read.

Every format is blocks of codes with a scale each. A weight is the value of its code times its block's scale, taken in
float32 and rounded once to the dtype asked for. Matrices are [out, in] whatever the layout of the layer they are from.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

PIECE = 1 << 19  # weights that are read together: their codes and values stay in a core's second cache


class Stored(NamedTuple):
    """Shape and dtype of one of the tensors that a stack of matrices is kept in; the first dimension is experts."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Format(ABC):
    """A way to keep frozen weights. The functions know nothing of pools or files.

    Attributes:
        name: what it is called in ``FORMATS``.
    """

    name: str

    @abstractmethod
    def layout(self, experts: int, rows: int, columns: int) -> dict[str, Stored]:
        """The tensors that keep [experts, rows, columns], by name, in the order of ``quantize``'s result.

        Raises ValueError for sizes that the format cannot hold.
        """

    @abstractmethod
    def encode(self, weight_OI: Tensor) -> tuple[Tensor, ...]:
        """One float32 matrix as the format keeps it, in tensors like ``layout``'s without the first dimension."""

    @abstractmethod
    def decode(self, parts: Sequence[Tensor], rows: int, columns: int, out: Tensor) -> Tensor:
        """One matrix [rows, columns] from its tensors, in the memory of ``out`` or in its own.

        Args:
            parts: this expert's tensors, like ``layout``'s without the first dimension.
            out: contiguous, one dimension, of at least ``buffer_size`` elements, in the dtype wanted.

        Returns the matrix; its rows may lie further apart than its columns need.
        """

    def buffer_size(self, rows: int, columns: int) -> int:
        """Elements that ``decode`` may write: blocks are written whole."""
        return rows * columns

    def quantize(self, weight_EOI: Tensor) -> tuple[Tensor, ...]:
        """A stack of matrices [E, O, I] of any float dtype and strides, expert by expert, as the format keeps it.

        Raises ValueError for weights that are not finite, and for sizes that the format cannot hold.
        """
        layout = self.layout(*weight_EOI.shape)
        found = tuple(weight_EOI.new_empty(shape, dtype=dtype) for shape, dtype in layout.values())
        for expert, weight_OI in enumerate(weight_EOI.detach()):
            if not weight_OI.isfinite().all():
                raise ValueError(f"{self.name}: weights of expert {expert} are not finite")
            for whole, part in zip(found, self.encode(weight_OI.float()), strict=True):
                whole[expert] = part
        return found

    def nbytes(self, experts: int, rows: int, columns: int) -> int:
        """Bytes that a stack of matrices takes."""
        return sum(prod(shape) * dtype.itemsize for shape, dtype in self.layout(experts, rows, columns).values())

    def check(self, tensors: Sequence[Tensor], experts: int, rows: int, columns: int, name: str) -> None:
        """Raise ValueError, which begins with ``name``, where the tensors are not those of ``layout``, in order."""
        layout = self.layout(experts, rows, columns)
        if len(tensors) != len(layout):
            raise ValueError(f"{name} in {self.name} is {', '.join(layout)}; got {len(tensors)} tensors")
        for (part, (shape, dtype)), tensor in zip(layout.items(), tensors, strict=True):
            if tuple(tensor.shape) != shape or tensor.dtype != dtype:
                raise ValueError(
                    f"{name} {part} of {self.name} must be {dtype} {shape}, got {tensor.dtype} {tuple(tensor.shape)}"
                )
            if not tensor.is_contiguous():
                raise ValueError(f"{name} {part} of {self.name} must be contiguous, got strides {tensor.stride()}")

    def check_values(self, tensors: Sequence[Tensor], name: str) -> None:
        """Raise ValueError, which begins with ``name``, for a scale that is no number. Reads them all."""
        for tensor in tensors[1:]:
            if not tensor.isfinite().all():
                raise ValueError(f"{name}: a scale of {self.name} is not finite")


def blocks_of(count: int, block: int) -> int:
    """How many blocks hold ``count`` elements; the last may be short."""
    return -(-count // block)


def scale_for(largest: Tensor, most: float) -> Tensor:
    """``largest / most``, the same bits on every device: a GPU would multiply by the reciprocal of a plain number."""
    return largest / torch.full_like(largest, most)


def scale_into(out: Tensor, values: Tensor, scales: Tensor, block: int) -> None:
    """``out = values * scales``, a scale for every block of one-dimensional values, which are float32 and overwritten.

    In float32 and converted at once: PyTorch's products of mixed dtypes take half as long again on a CPU.
    """
    values.view(-1, block).mul_(scales[:, None])
    out.copy_(values)


def padded(weight_OI: Tensor, block: int) -> Tensor:
    """[O, blocks, block] of a matrix [O, I], with zeros behind the rows that do not fill their last block."""
    surplus = -weight_OI.shape[1] % block
    return torch.nn.functional.pad(weight_OI, (0, surplus)).view(weight_OI.shape[0], -1, block)

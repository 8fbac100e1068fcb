"""Which elements of which tensor: the one vocabulary for how a model's weights relate to stored tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Protocol

import torch
from einops import rearrange
from torch import Tensor


class View(Protocol):
    """Some elements of a tensor, in some order and shape."""

    def read(self, tensor: Tensor) -> Tensor:
        """These elements; a view of the tensor where that can be."""
        ...

    def write(self, tensor: Tensor, value: Tensor) -> None:
        """Put what ``read`` gives, of as many elements, back into the tensor."""
        ...


ROWS: dict[str, Callable[[Tensor], Tensor]] = {
    "all": lambda x: x,
    "first half": lambda x: x.chunk(2)[0],
    "second half": lambda x: x.chunk(2)[1],
    # The halves' rows, one of each after the other; still a view, of one dimension more.
    "in turn": lambda x: rearrange(x, "(half row) ... -> row half ...", half=2),
}


@dataclass(frozen=True)
class Part:
    """Rows of a tensor of any size, as one of ``ROWS``; of a transposed matrix where ``transposed``."""

    rows: str = "all"
    transposed: bool = False

    def read(self, tensor: Tensor) -> Tensor:
        view = self._view(tensor)
        return rearrange(view, "row half ... -> (row half) ...") if self.rows == "in turn" else view

    def write(self, tensor: Tensor, value: Tensor) -> None:
        view = self._view(tensor)
        view.copy_(value.reshape(view.shape))

    def _view(self, tensor: Tensor) -> Tensor:
        return ROWS[self.rows](tensor.mT if self.transposed else tensor)


WHOLE = Part()


def part_that_reads(tensor: Tensor, numbers: Tensor) -> Part | None:
    """The part of a tensor of different numbers that reads these; None where there is none."""
    for transposed, rows in product((False, True) if tensor.dim() == 2 else (False,), ROWS):
        part = Part(rows, transposed)
        halves = tensor.shape[-1 if transposed else 0] % 2 == 0
        if (rows == "all" or halves) and torch.equal(part.read(tensor), numbers):
            return part
    return None


@dataclass(frozen=True)
class Strided:
    """Some elements of a tensor, in nested loops: what slicing, transposing, interleaving and permuting heads select.

    Attributes:
        shape: what is read has.
        sizes, strides, offset: of the loops, counted in elements.
    """

    shape: tuple[int, ...]
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    def read(self, tensor: Tensor) -> Tensor:
        return self._view(tensor).reshape(self.shape)

    def write(self, tensor: Tensor, value: Tensor) -> None:
        self._view(tensor).copy_(value.reshape(self.sizes))

    def _view(self, tensor: Tensor) -> Tensor:
        return tensor.view(-1).as_strided(self.sizes, self.strides, tensor.storage_offset() + self.offset)


def strided(numbers: Tensor, shape: tuple[int, ...]) -> Strided | None:
    """The loops that count these numbers, from the innermost outwards; None where they are not regular."""
    offset, sizes, strides = int(numbers[0]), [], []
    while numbers.numel() > 1:
        steps = numbers.diff()
        breaks = (steps != steps[0]).nonzero()
        size = int(breaks[0]) + 1 if breaks.numel() else numbers.numel()
        if steps[0] < 0 or numbers.numel() % size:
            return None
        rows = numbers.view(-1, size)
        if not torch.equal(rows - rows[:, :1], (rows[0] - rows[0, 0]).expand_as(rows)):
            return None
        sizes.insert(0, size)
        strides.insert(0, int(steps[0]))
        numbers = rows[:, 0].contiguous()
    return Strided(shape, tuple(sizes), tuple(strides), offset)


@dataclass(frozen=True)
class Link:
    """Elements of one of the model's weights that are elements of a stored tensor.

    Attributes:
        parameter: the weight's name in the stock model.
        expert: of a parameter that stacks experts, whose slice of it the weight is.
        inside: which elements of the weight.
        outside: which elements of the stored tensor.
    """

    parameter: str
    expert: int | None = None
    inside: View = WHOLE
    outside: View = WHOLE

    def store(self, weight: Tensor, stored: Tensor) -> None:
        """Write what the weight has of a stored tensor into that."""
        self.outside.write(stored, self.inside.read(weight))

    def load(self, weight: Tensor, stored: Tensor) -> None:
        """Write what a stored tensor has of the weight into that."""
        self.inside.write(weight, self.outside.read(stored.contiguous()))


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that a checkpoint in the original format holds, or one expert's slice of it.

    Attributes:
        name: of the checkpoint's tensor.
        expert: of one that stacks experts along its first dimension, whose slice this is.
        shape: of the tensor, or of the slice.
        links: everything of the model that it holds.
    """

    name: str
    expert: int | None
    shape: tuple[int, ...]
    links: tuple[Link, ...]

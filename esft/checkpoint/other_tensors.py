"""How a checkpoint stores the parameters that are no routed expert's: as they are, in pieces, or several in one tensor.

As for the experts, transformers' conversion of element numbers tells which element went where.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from esft.checkpoint.original_format import by_layer, to_stored
from esft.errors import InputError


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


@dataclass(frozen=True)
class Share:
    """What one parameter has of a stored tensor.

    Attributes:
        parameter: its name in the model.
        inside: the elements of the parameter; None for all.
        outside: the elements of the stored tensor; None for all.
    """

    parameter: str
    inside: Strided | None = None
    outside: Strided | None = None


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the checkpoint, and the parameters that it holds all or some elements of."""

    shape: tuple[int, ...]
    shares: tuple[Share, ...]


def stored_tensors(model: PreTrainedModel, parameters: dict[str, Tensor]) -> dict[str, StoredTensor]:
    """What a checkpoint of this model holds of some parameters, by the checkpoint's names; none is a routed expert's.

    Raises InputError where the checkpoint mixes elements in a way that cannot be followed.
    """
    found: dict[str, StoredTensor] = {}
    for names in by_layer(parameters):
        # Without memory first: most tensors are renamed at most, and come out as they went in.
        marks = {name: torch.empty(parameters[name].shape, device="meta") for name in names}
        by_mark = {id(mark): name for name, mark in marks.items()}
        for stored, tensor in to_stored(model, dict(marks)).items():
            if (name := by_mark.pop(id(tensor), None)) is not None:
                found[stored] = StoredTensor(tuple(tensor.shape), (Share(name),))
        found |= _converted(model, {name: marks[name].numel() for name in by_mark.values()}, parameters)
    return found


def _converted(
    model: PreTrainedModel, sizes: dict[str, int], parameters: dict[str, Tensor]
) -> Iterator[tuple[str, StoredTensor]]:
    """The stored tensors that these parameters are converted to, all together."""
    probes, begins = {}, {}
    for name, size in sizes.items():
        begins[name] = begin = sum(probe.numel() for probe in probes.values())
        probes[name] = torch.arange(begin, begin + size).view(parameters[name].shape)
    for stored, numbers in to_stored(model, dict(probes)).items() if probes else ():
        yield stored, StoredTensor(tuple(numbers.shape), tuple(_shares(stored, numbers, begins, sizes)))


def _shares(stored: str, numbers: Tensor, begins: dict[str, int], sizes: dict[str, int]) -> Iterator[Share]:
    flat = numbers.flatten()
    for name, begin in begins.items():
        places = ((flat >= begin) & (flat < begin + sizes[name])).nonzero().flatten()
        if places.numel():
            alone = places.numel() == flat.numel()
            inside = strided(flat[places] - begin, tuple(numbers.shape) if alone else (places.numel(),))
            outside = None if alone else strided(places, (places.numel(),))
            if inside is None or (outside is None and not alone):
                raise InputError(f"{stored}: the checkpoint stores {name} in a way that is not supported")
            yield Share(name, inside, outside)


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

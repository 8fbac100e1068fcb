"""From a model's own tensors to those of its checkpoint, by transformers' own conversion.

transformers renames, stacks, fuses and splits tensors when it loads a checkpoint, and turns that back when it saves. A
checkpoint may also hold the tensors as the model does (``save_original_format=False``). Names here are always those of
the original format, however the model at hand was stored: so digests and adapters are the same for both.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial

from torch import Tensor
from transformers import PreTrainedModel

from esft.experts.model_state import once_per_model
from esft.transformers_internals import conversions, revert

# Names of a model's tensors, and what reads one -> those of the checkpoint.
ToStored = Callable[[Iterable[str], Callable[[str], Tensor]], Iterator[tuple[str, Tensor]]]

_conversions = once_per_model(conversions)


def original_format(model: PreTrainedModel) -> ToStored:
    """A function of a model's tensors, stock names and all, that gives those of its checkpoint in the original format.

    It goes layer by layer: what is read and copied is never more than one layer. Tensors that are fused or split
    together have to come together.
    """
    return partial(_to_stored, partial(revert, model, _conversions(model)))


def _to_stored(
    convert: Callable[[dict[str, Tensor]], dict[str, Tensor]], names: Iterable[str], read: Callable[[str], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    for group in by_layer(names):
        yield from convert({name: read(name) for name in group}).items()


def by_layer(names: Iterable[str]) -> Iterator[list[str]]:
    """Names of a model's tensors in groups of one layer, which no conversion reaches beyond."""
    groups: dict[str, list[str]] = {}
    for name in names:
        number = re.search(r"^.*?\.\d+(?=\.)", name)
        groups.setdefault(number[0] if number else "", []).append(name)
    yield from groups.values()

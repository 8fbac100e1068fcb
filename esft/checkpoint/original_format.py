"""From a model's own tensors to those of its checkpoint, by transformers' own conversion.

transformers renames, stacks, fuses and splits tensors when it loads a checkpoint, and turns that back when it saves. A
checkpoint may also hold the tensors as the model does (``save_original_format=False``). Names here are always those of
the original format, however the model at hand was stored: so digests and adapters are the same for both.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)

from esft.experts.model_state import once_per_model


def to_stored(model: PreTrainedModel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a model, by its own names -> those of its checkpoint in the original format.

    Tensors that are fused or split together have to come together.
    """
    return revert_weight_conversion(_Original(model), tensors)


def stored_by_layer(
    model: PreTrainedModel, names: Iterable[str], read: Callable[[str], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """``to_stored`` of all these tensors, layer by layer: what is read and copied is never more than one layer."""
    for group in by_layer(names):
        yield from to_stored(model, {name: read(name) for name in group}).items()


def by_layer(names: Iterable[str]) -> Iterator[list[str]]:
    """Names of a model's tensors in groups of one layer, which no conversion reaches beyond."""
    groups: dict[str, list[str]] = {}
    for name in names:
        number = re.search(r"^.*?\.\d+(?=\.)", name)
        groups.setdefault(number[0] if number else "", []).append(name)
    yield from groups.values()


class _Original:
    """A model as ``revert_weight_conversion`` looks at it, with the conversions of the original format."""

    def __init__(self, model: PreTrainedModel):
        self._model = model
        self._weight_conversions = _conversions(model)

    def get_parameter(self, name: str) -> Tensor:
        """Of no shape: where a conversion transposes tensors unless they have the model's shape already, it does.

        A swapped model has no such parameter, and the original format is the one that differs from the model's.
        """
        return torch.empty(0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


@once_per_model
def _conversions(model: PreTrainedModel) -> list[Any]:
    """The conversions between the original format and the model, found once as they are asked for layer by layer.

    A loaded model remembers those that its files needed. Where these are the very ones that the model's own names set
    off, the files held the tensors as the model does, and the family's are the ones.
    """
    of_files = getattr(model, "_weight_conversions", None)
    of_family = get_model_conversion_mapping(model)
    renamings = [c for c in of_family if isinstance(c, WeightRenaming)]
    converters = [c for c in of_family if isinstance(c, WeightConverter)]
    for name in model.state_dict():
        rename_source_key(name, renamings, converters)
    of_names = [_patterns(c) for c in of_family if c.was_used()]
    if of_files is None or [_patterns(c) for c in of_files] == of_names:
        # As transformers does: whether files have a prefix is not known, and nobody saves by the legacy names.
        return [c for c in get_model_conversion_mapping(model, add_legacy=False) if not isinstance(c, PrefixChange)]
    return of_files


def _patterns(conversion: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return tuple(conversion.source_patterns), tuple(conversion.target_patterns)

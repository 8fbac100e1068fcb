"""Where the tensors of an adapter belong: in a model, and in the files of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from esft.checkpoint.original_format import original_format
from esft.checkpoint.tensor_names import expert_tensors, other_tensors
from esft.checkpoint.views import WHOLE, Link, StoredTensor
from esft.errors import InputError
from esft.experts.moe_layers import moe_layers, stock_weights
from esft.experts.pooled_experts import Experts
from esft.selection import ExpertSelection


@dataclass(frozen=True)
class AdapterTensor:
    """A tensor of an adapter.

    Attributes:
        stored: what a checkpoint holds of it.
        weights: the model's, one for each link of that; detached.
    """

    stored: StoredTensor
    weights: tuple[Tensor, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape

    def read(self) -> Tensor:
        """Its value, from the model; a view where that can be."""
        first = self.stored.links[0]
        if first.outside == WHOLE:
            return first.inside.read(self.weights[0])
        value = self.weights[0].new_empty(self.shape)
        for link, weight in zip(self.stored.links, self.weights, strict=True):
            link.store(weight, value)
        return value

    def write(self, value: Tensor) -> None:
        """Put a value into the model."""
        for link, weight in zip(self.stored.links, self.weights, strict=True):
            link.load(weight, value)

    def in_files(self, as_in_memory: bool) -> Iterator[tuple[Link, tuple[int, ...]]]:
        """Which tensors of a checkpoint's files it changes, and the shape of each, or of its slice.

        They are the model's own where the files hold these (``as_in_memory``), and one of the original format else.
        """
        if as_in_memory:
            yield from ((link, tuple(w.shape)) for link, w in zip(self.stored.links, self.weights, strict=True))
        else:
            yield Link(self.stored.name, self.stored.expert), self.shape


def adapter_tensors(model: PreTrainedModel, selection: ExpertSelection) -> dict[str, AdapterTensor]:
    """Everything that the selection trains, by its name in an adapter; of a stock or a swapped model.

    Raises InputError where the selection does not fit the model, and where the checkpoint stores something of it in a
    way that is not supported.
    """
    weights = stock_weights(model)
    selection.check(weights.num_experts, bool(weights.shared))
    for layer in moe_layers(model):
        for expert in selection.experts.get(layer.index, []):
            if isinstance(layer.experts, Experts) and layer.experts.is_packed(expert):
                raise InputError(f"layer {layer.index}: expert {expert} is frozen in {layer.experts.frozen}")
    to_stored = original_format(model)
    found: dict[str, AdapterTensor] = {}
    names = expert_tensors(model, weights.experts, to_stored) if selection.num_experts else {}
    for layer, expert in ((layer, expert) for layer, ids in selection.experts.items() for expert in ids):
        own = weights.experts[layer].weights(expert)
        for name, stored in names[layer, expert].items():
            found[name] = AdapterTensor(stored, tuple(own[link.parameter] for link in stored.links))
    trained = weights.shared.keys() if selection.shared_experts else set()
    trained |= weights.others.keys() if selection.non_expert_modules else set()
    others = weights.shared | weights.others
    for name, stored in other_tensors(to_stored, others).items() if trained else ():
        parameters = {link.parameter for link in stored.links}
        if parameters <= trained:
            found[name] = AdapterTensor(stored, tuple(others[link.parameter] for link in stored.links))
        elif parameters & trained:
            raise InputError(
                f"{name}: the checkpoint stores {', '.join(sorted(parameters))} in one tensor, and the selection does "
                "not train them all"
            )
    return found

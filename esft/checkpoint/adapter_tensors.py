"""Where the tensors of an adapter belong: in a model, and in the files of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from esft.checkpoint.stored_tensors import expert_tensors, other_tensors
from esft.checkpoint.views import WHOLE, Link, StoredTensor
from esft.errors import InputError
from esft.experts.moe_layers import MoELayer, moe_layers, routed_parameters
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
    layers = moe_layers(model)
    selection.check({layer.index: layer.num_experts for layer in layers})
    found: dict[str, AdapterTensor] = {}
    for layer in layers:
        for expert in selection.experts.get(layer.index, ()):
            weights = layer.weights(expert)
            for name, stored in expert_tensors(model)[layer.index, expert].items():
                found[name] = AdapterTensor(stored, tuple(weights[link.parameter] for link in stored.links))
    if selection.shared_experts or selection.non_expert_modules:
        found |= _others(model, layers, selection)
    return found


def _others(model: PreTrainedModel, layers: list[MoELayer], selection: ExpertSelection) -> dict[str, AdapterTensor]:
    routed = {p for layer in layers for p in routed_parameters(layer)}
    shared = {p for layer in layers for m in layer.shared_experts for p in m.parameters()}
    others = {name: p.detach() for name, p in model.named_parameters() if p not in routed}
    trained = {
        name for name, p in model.named_parameters()
        if name in others and (selection.shared_experts if p in shared else selection.non_expert_modules)
    }  # fmt: skip
    found = {}
    for name, stored in other_tensors(model, others).items():
        parameters = {link.parameter for link in stored.links}
        if parameters <= trained:
            found[name] = AdapterTensor(stored, tuple(others[link.parameter] for link in stored.links))
        elif parameters & trained:
            raise InputError(
                f"{name}: the checkpoint stores {', '.join(sorted(parameters))} in one tensor, and the selection does "
                "not train them all"
            )
    return found

"""Writing a checkpoint's experts to the pools of a model, tensor by tensor as they come from the files."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from math import prod

import torch
from torch import Tensor
from transformers import PreTrainedModel

from esft.checkpoint.original_format import original_format
from esft.checkpoint.packed_tensors import Named, PackedTensor
from esft.checkpoint.tensor_names import expert_tensors, other_tensors
from esft.checkpoint.views import WHOLE, Part, StoredTensor
from esft.errors import InputError
from esft.experts.moe_layers import moe_layers, stock_weights
from esft.experts.pooled_experts import PROJECTIONS, Experts
from esft.swapping.load_state import is_pool
from esft_kernels.formats.fp8 import BLOCK

HALVES = ("first half", "second half")

Places = dict[str, list[tuple[int, int, StoredTensor]]]  # a stored tensor -> layer, expert, and what of it that has


def expert_places(model: PreTrainedModel) -> Places:
    """Which experts a checkpoint's tensors belong to, by their names in the original format; none for a ModuleList."""
    stacks, places = stock_weights(model).experts, defaultdict(list)
    if not all(stack.stacked for stack in stacks.values()):
        return {}
    for (layer, expert), tensors in expert_tensors(model, stacks, original_format(model)).items():
        for stored in tensors.values():
            places[stored.name].append((layer, expert, stored))
    return dict(places)


class Filling:
    """The experts of a model whose weights are on their way.

    Args:
        model: with ``Experts`` in every MoE layer, whose values are anything.
        places: ``expert_places`` of the stock model.
        path: of the checkpoint, for messages.
    """

    def __init__(self, model: PreTrainedModel, places: Places, path: str):
        self._model, self._places, self._path = model, places, path
        self._layers = {layer.index: layer for layer in moe_layers(model)}
        # Of each weight of an expert, by layer, expert and its name: the elements that have not come.
        self._missing: dict[tuple[int, int, str], int] = {}
        for index, layer in self._layers.items():
            sizes = {name: weight.numel() for name, weight in layer.weights(0).items()}
            experts = range(layer.num_experts)
            self._missing |= {(index, e, name): size for e in experts for name, size in sizes.items()}
        self._buffers: dict[tuple[int, int, str], Tensor] = {}  # what has come of weights that will be packed
        self._halves: dict[tuple[int, int, str], dict[str, tuple[Tensor, ...]]] = defaultdict(dict)

    def through(self, tensors: Iterable[Named]) -> Iterator[Named]:
        """The same tensors, each written to where it belongs before it is handed on.

        Raises InputError naming a tensor that does not fit, and where one is missing at the end.
        """
        others: dict[str, PackedTensor] = {}
        for name, value in tensors:
            for layer, expert, stored in self._places.get(name, ()):
                try:
                    self._put(layer, expert, stored, value)
                except ValueError as error:  # of a format
                    raise InputError(f"{self._path}: tensor {name}: {error}") from error
            if isinstance(value, PackedTensor) and name not in self._places:
                others[name] = value
            yield name, value
        for layer, expert, stored in (place for places in self._places.values() for place in places):
            if any(self._missing.get((layer, expert, link.parameter)) for link in stored.links):
                raise InputError(f"{self._path}: tensor {stored.name} is missing")
        self._put_others(others)

    def _put(self, layer: int, expert: int, stored: StoredTensor, value: Tensor | PackedTensor) -> None:
        whole = (self._layers[layer].num_experts, *stored.shape) if stored.expert is not None else stored.shape
        if tuple(value.shape) != whole:
            raise ValueError(f"has shape {tuple(value.shape)}, the model's has {whole}")
        experts = self._experts(layer)
        if not experts.holds(expert):
            for link in stored.links:
                key = (layer, expert, link.parameter)
                self._came(key, link.inside.read(self._layers[layer].weights(expert)[link.parameter]).numel())
            return
        if isinstance(value, PackedTensor) and experts.is_packed(expert) and experts.frozen == value.format:
            self._put_packed(layer, expert, stored, value.matrices()[stored.expert or 0])
            return
        if isinstance(value, PackedTensor):
            tensor = value.read(stored.expert)
        else:
            tensor = value if stored.expert is None else value[stored.expert]
        for link in stored.links:
            key = (layer, expert, link.parameter)
            own = self._buffer(key) if experts.is_packed(expert) else self._layers[layer].weights(expert)[key[2]]
            link.load(own, tensor)
            self._came(key, link.inside.read(own).numel())
            if experts.is_packed(expert) and key not in self._missing:
                experts.write_one(expert, self._projection(*key), self._buffers.pop(key))

    def _buffer(self, key: tuple[int, int, str]) -> Tensor:
        """What has come of a weight that will be packed, and room for the rest."""
        if key not in self._buffers:
            like = getattr(self._experts(key[0]), f"trained_{self._projection(*key)}").detach()
            self._buffers[key] = like.new_empty(like.shape[1:])
        return self._buffers[key]

    def _put_packed(self, layer: int, expert: int, stored: StoredTensor, parts: tuple[Tensor, ...]) -> None:
        """Put a matrix where it belongs without reading it; one of two halves waits for the other."""
        experts, (link,) = self._experts(layer), stored.links
        key = (layer, expert, link.parameter)
        name = self._projection(*key)
        turned = experts.transposed  # then stacks are [in, out] to transformers; in few bits they are [out, in] always
        if link.inside == WHOLE and turned == (stored.expert is not None):
            experts.write_stored(expert, name, parts)
        elif isinstance(link.inside, Part) and link.inside.rows in HALVES and not turned and not link.inside.transposed:
            if stored.shape[0] % BLOCK:
                raise ValueError(f"gate and up cannot be one matrix in fp8: {BLOCK} does not divide their rows")
            halves = self._halves[key]
            halves[link.inside.rows] = parts
            if len(halves) == len(HALVES):
                both = zip(*(halves[half] for half in HALVES), strict=True)
                experts.write_stored(expert, name, [torch.cat(pair) for pair in both])
                del self._halves[key]
        else:
            raise ValueError("lies in the files in a way that cannot stay in few bits")
        self._came(key, prod(stored.shape))

    def _experts(self, layer: int) -> Experts:
        experts = self._layers[layer].experts
        assert isinstance(experts, Experts)
        return experts

    def _came(self, key: tuple[int, int, str], count: int) -> None:
        self._missing[key] -= count
        if not self._missing[key]:
            del self._missing[key]

    def _projection(self, layer: int, expert: int, parameter: str) -> str:
        """Our own name for a stock module's parameter."""
        return PROJECTIONS[self._experts(layer).stock_names.index(parameter.rpartition(".")[2])]

    @torch.no_grad()
    def _put_others(self, packed: dict[str, PackedTensor]) -> None:
        """Weights in few bits that are no experts' are read, as the model computes with their values."""
        if not packed:
            return
        parameters = {name: p for name, p in self._model.named_parameters() if not is_pool(name)}
        for name, stored in other_tensors(original_format(self._model), parameters).items():
            if name in packed:
                value = packed[name].read()
                for link in stored.links:
                    link.load(parameters[link.parameter], value)

"""Reading a checkpoint's tensors into a swapped model."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from esft.checkpoint.original_format import original_format
from esft.checkpoint.tensor_names import expert_tensors, other_tensors
from esft.checkpoint.views import Link, Part, StoredTensor
from esft.errors import InputError
from esft.experts.model_state import known_state
from esft.experts.moe_layers import MoELayer, moe_layers, stock_weights
from esft.experts.pooled_experts import BF16, PROJECTIONS, Experts
from esft.parallel.sharding import is_cut_up
from esft.swapping.packed_modules import PackedModule

_POOL = re.compile(rf".*\.(trained|frozen)_({'|'.join(PROJECTIONS[:2])})\w*")


def is_pool(name: str) -> bool:
    """Whether a parameter of a swapped model is a pool of experts, or a part of one in few bits."""
    return _POOL.fullmatch(name) is not None


def stock_shapes(layer: MoELayer) -> dict[str, tuple[int, ...]]:
    """The parameters of a swapped layer's stock experts, by their names in the model."""
    return {name: (layer.num_experts, *weight.shape) for name, weight in layer.weights(0).items()}


def whole_pools(layer: MoELayer, pools: Sequence[Tensor | None], advice: str) -> list[Tensor]:
    """The two pools. Raises InputError for shards, and for what stands for weights that are elsewhere."""
    if layer.experts.deal is not None:
        raise InputError(f"{layer.name}: the experts are dealt out over processes; save an adapter, and merge it")
    held = [
        pool
        for pool, rows in zip(pools, (len(layer.experts.trained), layer.experts.num_frozen), strict=True)
        if pool is not None and pool.shape[:1] == (rows,) and not is_cut_up(pool)
    ]
    if len(held) < 2:
        raise InputError(f"{layer.name}: a part of the experts is elsewhere (spread over ranks?); {advice}")
    return held


def read_stock(model: PreTrainedModel, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Before ``load_state_dict``: what has a checkpoint's name gets to where the swapped model has it.

    Experts are written to the pools at once, tensor by tensor, so that nothing is held twice and the shards of a
    checkpoint can come one by one. Pools of which a part did not come are reported as missing.
    """
    if any(map(is_pool, state_dict)):  # a swapped model's own state
        return
    own = model.state_dict()
    names = [name.removeprefix(prefix) for name in state_dict]
    _check_not_packed(model, set(names) - own.keys())
    foreign = {name: state_dict.pop(prefix + name) for name in names if name not in own}
    if foreign and known_state(model).mixed is not None:
        raise InputError("the model holds adapters side by side: load the checkpoint before them")
    found = _read_experts(model, foreign) if foreign else {}
    if foreign:
        absent = [name for name in own if prefix + name not in state_dict and not is_pool(name)]
        found |= _read_others(model, {name: own[name] for name in absent}, foreign)
    state_dict.update({prefix + name: tensor for name, tensor in (foreign | found).items()})


def _check_not_packed(model: PreTrainedModel, foreign: set[str]) -> None:
    """Raise InputError naming a tensor of a checkpoint that belongs to a layer whose weights are kept in few bits."""
    packed = {f"{name}.weight": module for name, module in model.named_modules() if isinstance(module, PackedModule)}
    weights = {name: torch.empty(m.rows, m.columns, device="meta") for name, m in packed.items()}
    stored = other_tensors(original_format(model), weights)
    owners = {own: own for own in packed} | {name: tensor.links[0].parameter for name, tensor in stored.items()}
    if found := sorted(foreign & owners.keys()):
        kept = packed[owners[found[0]]].format_name
        raise InputError(f"{found[0]}: the frozen linear layers are in {kept}; load it with esft.load")


def _read_experts(model: PreTrainedModel, foreign: dict[str, Tensor]) -> dict[str, Tensor]:
    """Write the experts' tensors among ``foreign`` to the pools, and take them out; returns the pools now complete."""
    layers = {layer.index: layer for layer in moe_layers(model) if isinstance(layer.experts, Experts)}
    stored: dict[str, list[tuple[MoELayer, int, StoredTensor]]] = defaultdict(list)
    tensors_of = expert_tensors(model, stock_weights(model).experts, original_format(model))
    for (index, expert), tensors in tensors_of.items():
        for tensor in tensors.values() if index in layers else ():
            stored[tensor.name].append((layers[index], expert, tensor))
    for layer in layers.values():  # what a stock model's own state has, and a save with save_original_format=False
        for name, shape in stock_shapes(layer).items():
            # Where only the shape tells which of the two it is, it does so for transformers too.
            told_by_shape = any(link.inside == Part(transposed=True) for *_, t in stored[name][:1] for link in t.links)
            if name in foreign and (not stored[name] or (told_by_shape and foreign[name].shape == shape)):
                tensors = [StoredTensor(name, e, shape[1:], (Link(name, e),)) for e in range(layer.num_experts)]
                stored[name] = [(layer, tensor.expert, tensor) for tensor in tensors]
    missing: dict[int, int] = {}  # elements of the layers of which some came
    for name in [name for name in stored if name in foreign]:
        value = foreign.pop(name)
        for layer, expert, tensor in stored[name]:
            if layer.experts.frozen != BF16:
                raise InputError(f"{name}: the frozen experts are in {layer.experts.frozen}; load it with esft.load")
            if layer.index not in missing:
                pools = (layer.experts.trained_down_proj, layer.experts.frozen_down_proj)
                whole_pools(layer, pools, "load the checkpoint before it is spread")
                missing[layer.index] = sum(p.numel() for p in _pools(layer).values())
            stacked = tensor.expert is not None
            _check_shape(name, value, (layer.num_experts, *tensor.shape) if stacked else tensor.shape)
            part = value[expert] if stacked else value
            for link in tensor.links:
                link.load(layer.weights(expert)[link.parameter], part)
            missing[layer.index] -= part.numel()
    return {name: p for index, rest in missing.items() if not rest for name, p in _pools(layers[index]).items()}


def _check_shape(name: str, value: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(value.shape) != shape:
        raise InputError(f"{name}: has shape {tuple(value.shape)}, the model's has {shape}")


def _pools(layer: MoELayer) -> dict[str, Tensor]:
    return {f"{layer.name}.{name}": p for name, p in layer.experts.named_parameters(recurse=False)}


def _read_others(model: PreTrainedModel, absent: dict[str, Tensor], foreign: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take out of ``foreign`` what the checkpoint has under other names or in parts; returns it by the model's."""
    found: dict[str, Tensor] = {}
    for name, stored in other_tensors(original_format(model), absent).items():
        if name in foreign:
            value = foreign.pop(name)
            _check_shape(name, value, stored.shape)
            for link in stored.links:
                if link.parameter not in found:
                    found[link.parameter] = absent[link.parameter].clone(memory_format=torch.contiguous_format)
                link.load(found[link.parameter], value)
    return found

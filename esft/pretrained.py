"""What ``save_pretrained`` writes of a swapped model: the stock model's checkpoint. And reading one back into it.

The pools keep their own names in ``state_dict()``, which so costs no copy and shows what is there to whatever shards or
saves parameters. Only what leaves through ``save_pretrained`` is put as the stock model has it, and what comes in
through ``load_state_dict`` under a checkpoint's names is written to the pools. transformers' ``Trainer`` does both.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from esft.errors import InputError
from esft.families import MoELayer, moe_layers
from esft.moe import PROJECTIONS, Experts
from esft.parameters import stored_tensors
from esft.slots import Piece
from esft.stored import ExpertTensor, expert_tensors, expert_weights, stock_names

_POOLS = tuple(f".{pool}_{name}" for pool, name in product(("trained", "frozen"), PROJECTIONS))


def attach(model: PreTrainedModel) -> None:
    """Make ``save_pretrained`` and ``load_state_dict`` of a swapped model do this, until ``detach``."""
    vars(model)["save_pretrained"] = _Saving(model)  # and no subclass of the model's: its type is looked up by others
    vars(model)["esft_load_hook"] = model.register_load_state_dict_pre_hook(_read_stock)


def detach(model: PreTrainedModel) -> None:
    """Undo ``attach``; nothing where that was not done."""
    vars(model).pop("save_pretrained", None)
    if (hook := vars(model).pop("esft_load_hook", None)) is not None:
        hook.remove()


class _Saving:
    """``save_pretrained`` of one model: of the copy in a deep copy, and without keeping the model alive."""

    def __init__(self, model: PreTrainedModel):
        self.__setstate__(model)

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        model = self._model()
        assert model is not None
        save_pretrained(model, *args, **kwargs)

    def __getstate__(self) -> PreTrainedModel | None:
        return self._model()

    def __setstate__(self, model: PreTrainedModel) -> None:
        self._model = weakref.ref(model)


def save_pretrained(
    model: PreTrainedModel,
    save_directory: str | PathLike,
    is_main_process: bool = True,
    state_dict: Mapping[str, Tensor] | None = None,
    *args: Any,
    **kwargs: Any,
) -> None:
    """transformers' ``save_pretrained`` for a swapped model: tuned weights under the stock model's names and shapes.

    What that costs is a copy of all experts in the CPU's memory, on the process that writes; on the device nothing.

    Args:
        state_dict: where given, a state of the swapped model, as ``accelerator.get_state_dict(model)`` collects it.
        The others are those of transformers.

    Raises InputError for experts that are spread over ranks, whose state has to be collected first.
    """
    save = partial(type(model).save_pretrained, model, save_directory, is_main_process)
    if getattr(model, "_hf_peft_config_loaded", False):  # PEFT's own weights alone are written
        return save(state_dict, *args, **kwargs)
    sharded = getattr(model.config, "distributed_config", None) is not None  # transformers would take its own state
    if sharded or kwargs.get("distributed_checkpoint", False):
        raise InputError("a swapped model that transformers has spread over ranks cannot be saved whole")
    if not is_main_process:
        return save({}, *args, **kwargs)
    swapped = [layer for layer in moe_layers(model) if isinstance(layer.experts, Experts)]
    shapes = {name: shape for layer in swapped for name, shape in _stock_shapes(model, layer).items()}
    vars(model)["get_parameter"] = partial(_get_parameter, model, shapes)  # some conversions ask for shapes
    # Not handed over: the save_pretrained of a quantised model asks the model for its state in any case.
    hook = model.register_state_dict_post_hook(_write_stock) if state_dict is None else None
    try:
        return save(None if state_dict is None else stock_state(model, state_dict), *args, **kwargs)
    finally:
        del vars(model)["get_parameter"]
        if hook is not None:
            hook.remove()


def _get_parameter(model: PreTrainedModel, shapes: dict[str, tuple[int, ...]], name: str) -> Tensor:
    """``get_parameter`` of the stock model; of its experts only the shape."""
    return torch.empty(shapes[name], device="meta") if name in shapes else type(model).get_parameter(model, name)


def _stock_shapes(model: nn.Module, layer: MoELayer) -> dict[str, tuple[int, ...]]:
    """The parameters of a layer's stock experts, by their names in the model."""
    pools = {name: getattr(layer.experts, f"frozen_{ours}") for name, ours in _ours(model, layer).items()}
    return {f"{layer.name}.{name}": (layer.num_experts, *pool.shape[1:]) for name, pool in pools.items()}


def _ours(model: nn.Module, layer: MoELayer) -> dict[str, str]:
    """The stock module's parameter names -> what the pools call them."""
    return dict(zip(stock_names(model, layer)[0], PROJECTIONS, strict=False))


def _write_stock(model: PreTrainedModel, state_dict: dict[str, Tensor], *_: Any) -> None:
    stock = stock_state(model, state_dict)
    state_dict.clear()
    state_dict.update(stock)


def stock_state(model: PreTrainedModel, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A swapped model's state as the stock model has it: names, shapes and order.

    The stacked experts are copies in the CPU's memory; all else is passed on. Raises InputError for pools that are not
    whole, and for some that belong to no layer.
    """
    layers = {layer.name: layer for layer in moe_layers(model) if isinstance(layer.experts, Experts)}
    stock: dict[str, Tensor] = {}
    done: set[str] = set()
    for name, tensor in state_dict.items():
        path = name.rpartition(".")[0]
        if not name.endswith(_POOLS):
            stock[name] = tensor
        elif path not in layers:
            raise InputError(f"{name}: the model has no such tensor (wrapped? unwrap it first)")
        elif path not in done:
            done.add(path)
            stock.update(_stacked(model, layers[path], state_dict))
    return stock


def _stacked(model: nn.Module, layer: MoELayer, state_dict: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """A layer's experts by the names of the stock module's parameters, in the order of those."""
    ours = _ours(model, layer)
    for name, _ in model.esft_state.stock[layer.name].named_parameters(recurse=False):
        pools = [state_dict.get(f"{layer.name}.{pool}_{ours[name]}") for pool in ("trained", "frozen")]
        trained, frozen = _whole(layer, pools, "to save it, collect the state: save_pretrained(..., state_dict=...)")
        yield f"{layer.name}.{name}", layer.experts.in_order(trained.cpu(), frozen.cpu())


def _whole(layer: MoELayer, pools: Sequence[Tensor | None], advice: str) -> list[Tensor]:
    """The two pools. Raises InputError for shards, and for what stands for weights that are elsewhere."""
    s = len(layer.experts.trained)
    held = [
        pool
        for pool, rows in zip(pools, (s, layer.num_experts - s), strict=True)
        if pool is not None and pool.shape[:1] == (rows,) and not hasattr(pool, "full_tensor")
    ]
    if len(held) < 2:
        raise InputError(f"{layer.name}: a part of the experts is elsewhere (spread over ranks?); {advice}")
    return held


def _read_stock(model: PreTrainedModel, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Before ``load_state_dict``: what has a checkpoint's name gets to where the swapped model has it.

    Experts are written to the pools at once, tensor by tensor, so that nothing is held twice and the shards of a
    checkpoint can come one by one. Pools of which a part did not come are reported as missing.
    """
    if any(name.endswith(_POOLS) for name in state_dict):  # a swapped model's own state
        return
    own = model.state_dict()
    names = [name.removeprefix(prefix) for name in state_dict]
    foreign = {name: state_dict.pop(prefix + name) for name in names if name not in own}
    found = _read_experts(model, foreign) if foreign else {}
    if foreign:
        absent = [name for name in own if prefix + name not in state_dict and not name.endswith(_POOLS)]
        found |= _read_others(model, {name: own[name] for name in absent}, foreign)
    state_dict.update({prefix + name: tensor for name, tensor in (foreign | found).items()})


def _read_experts(model: PreTrainedModel, foreign: dict[str, Tensor]) -> dict[str, Tensor]:
    """Write the experts' tensors among ``foreign`` to the pools, and take them out; returns the pools now complete."""
    layers = {layer.index: layer for layer in moe_layers(model) if isinstance(layer.experts, Experts)}
    stored: dict[str, list[ExpertTensor]] = defaultdict(list)
    for tensor in expert_tensors(model):
        stored[tensor.stored_name].append(tensor)
    for layer in layers.values():  # what a stock model's own state has, and a save with save_original_format=False
        for place, (name, shape) in enumerate(_stock_shapes(model, layer).items()):
            # Where only the shape tells which of the two it is, it does so for transformers too.
            told_by_shape = name in stored and stored[name][0].transposed
            if name in foreign and (name not in stored or (told_by_shape and foreign[name].shape == shape)):
                ids = range(layer.num_experts)
                stored[name] = [ExpertTensor(layer.index, e, name, name, True, place, "whole", False) for e in ids]
    missing = {index: sum(p.numel() for p in _pools(layer).values()) for index, layer in layers.items()}
    written: dict[int, dict[int, list]] = {}  # layer -> its experts' weights
    for name in [name for name in stored if name in foreign]:
        value = foreign.pop(name)
        for tensor in stored[name]:
            layer = layers[tensor.layer]
            if tensor.layer not in written:
                pools = (layer.experts.trained_down_proj, layer.experts.frozen_down_proj)
                _whole(layer, pools, "load the checkpoint before it is spread")
                written[tensor.layer] = expert_weights(model, layer, range(layer.num_experts))
            weight, _, _ = written[tensor.layer][tensor.expert][tensor.projection]
            shape = (layer.num_experts,) * tensor.stacked + tuple(tensor.read(weight).shape)
            _check_shape(name, value, shape)
            part = value[tensor.expert] if tensor.stacked else value
            tensor.write(weight, part)
            missing[tensor.layer] -= part.numel()
    return {name: p for index in written if not missing[index] for name, p in _pools(layers[index]).items()}


def _check_shape(name: str, value: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(value.shape) != shape:
        raise InputError(f"{name}: has shape {tuple(value.shape)}, the model's has {shape}")


def _pools(layer: MoELayer) -> dict[str, Tensor]:
    return {f"{layer.name}.{name}": p for name, p in layer.experts.named_parameters(recurse=False)}


def _read_others(model: PreTrainedModel, absent: dict[str, Tensor], foreign: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take out of ``foreign`` what the checkpoint has under other names or in parts; returns it by the model's."""
    found: dict[str, Tensor] = {}
    for name, stored in stored_tensors(model, absent).items():
        if name in foreign:
            value = foreign.pop(name)
            _check_shape(name, value, stored.shape)
            for share in stored.shares:
                if share.parameter not in found:
                    found[share.parameter] = absent[share.parameter].clone(memory_format=torch.contiguous_format)
                Piece(found[share.parameter], share.parameter, None, share).put(found[share.parameter], value)
    return found

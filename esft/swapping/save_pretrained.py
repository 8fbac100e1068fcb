"""What ``save_pretrained`` writes of a swapped model: the stock model's checkpoint. And reading one back into it.

The pools keep their own names in ``state_dict()``, which so costs no copy and shows what is there to whatever shards or
saves parameters. Only what leaves through ``save_pretrained`` is put as the stock model has it, and what comes in
through ``load_state_dict`` under a checkpoint's names is written to the pools. transformers' ``Trainer`` does both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from esft.errors import InputError
from esft.experts.model_state import OwnMethod, check_lossless, known_state, swapped_state
from esft.experts.moe_layers import MoELayer, is_apart, moe_layers
from esft.experts.pooled_experts import PROJECTIONS, Experts
from esft.parallel.environment import own_rank
from esft.swapping.load_state import is_pool, read_stock, stock_shapes, whole_pools
from esft.swapping.save_spread import save_spread
from esft.transformers_internals import has_peft_adapter, spread_by


def attach(model: PreTrainedModel) -> None:
    """Make ``save_pretrained`` and ``load_state_dict`` of a swapped model do this, until ``detach``."""
    # And no subclass of the model's: its type is looked up by others.
    vars(model)["save_pretrained"] = OwnMethod(model, "save_pretrained", save_pretrained)
    swapped_state(model).load_hook = model.register_load_state_dict_pre_hook(read_stock)


def detach(model: PreTrainedModel) -> None:
    """Undo ``attach``; nothing where that was not done."""
    vars(model).pop("save_pretrained", None)
    if (swapped := known_state(model).swapped) is not None and swapped.load_hook is not None:
        swapped.load_hook.remove()


def save_pretrained(
    model: PreTrainedModel,
    save_directory: str | PathLike,
    is_main_process: bool = True,
    state_dict: Mapping[str, Tensor] | None = None,
    *args: Any,
    **kwargs: Any,
) -> None:
    """transformers' ``save_pretrained`` for a swapped model: tuned weights under the stock model's names and shapes.

    What that costs is a copy of all experts in the CPU's memory, on the process that writes; on the device nothing. Of
    weights that are spread over ranks it is one file's at a time, see ``save_spread``: all ranks call this then, and
    the first one writes.

    Args:
        state_dict: where given, a state of the swapped model, as ``accelerator.get_state_dict(model)`` collects it.
        The others are those of transformers.

    Raises InputError for a model that transformers has spread over ranks, for other arguments where we have, and for
    frozen experts in a format that has cost some of their precision.
    """
    save = partial(type(model).save_pretrained, model, save_directory, is_main_process)
    if has_peft_adapter(model):  # PEFT's own weights alone are written
        return save(state_dict, *args, **kwargs)
    check_lossless(model, "save_pretrained")
    # Of a model that it has spread, transformers would take its own state.
    if spread_by(model) is not None or kwargs.get("distributed_checkpoint", False):
        raise InputError("a swapped model that transformers has spread over ranks cannot be saved whole")
    if state_dict is None and is_apart(model):
        if args or kwargs:
            raise InputError("a model whose weights are spread over ranks is saved without further arguments")
        return save_spread(model, Path(save_directory), is_main_process and own_rank() == 0, partial(save, {}))
    if not is_main_process:
        return save({}, *args, **kwargs)
    swapped = [layer for layer in moe_layers(model) if isinstance(layer.experts, Experts)]
    shapes = {name: shape for layer in swapped for name, shape in stock_shapes(layer).items()}
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
        if not is_pool(name):
            stock[name] = tensor
        elif path not in layers:
            raise InputError(f"{name}: the model has no such tensor (wrapped? unwrap it first)")
        elif path not in done:
            done.add(path)
            stock.update(_stacked(model, layers[path], state_dict))
    return stock


def _stacked(model: nn.Module, layer: MoELayer, state_dict: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """A layer's experts by the names of the stock module's parameters, in the order of those."""
    ours = dict(zip(layer.experts.stock_names, PROJECTIONS, strict=False))
    for name, _ in swapped_state(model).stock[layer.name].named_parameters(recurse=False):
        pools = [state_dict.get(f"{layer.name}.{pool}_{ours[name]}") for pool in ("trained", "frozen")]
        advice = "to save it, collect the state: save_pretrained(..., state_dict=...)"
        if layer.experts.format is not None and pools[1] is None:  # lossless: it is read
            pools[1] = layer.experts.frozen_stack(ours[name])
        trained, frozen = whole_pools(layer, pools, advice)
        yield f"{layer.name}.{name}", layer.experts.in_order(trained.cpu(), frozen.cpu())

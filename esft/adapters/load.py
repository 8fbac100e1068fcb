"""Loading adapters into a model, and switching between several on one base in memory."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from esft.adapters.folder import (
    adapter_weights,
    check_model,
    difference,
    open_adapter,
    selected_tensors,
)
from esft.adapters.mixed import show_adapter
from esft.checkpoint.adapter_tensors import AdapterTensor, adapter_tensors
from esft.checkpoint.digest import base_below, model_base
from esft.errors import InputError
from esft.experts.model_state import DEFAULT_ADAPTER, Adapters, model_state, settle_adapter
from esft.selection import ExpertSelection


def load_adapter(model: PreTrainedModel, path: str | Path, name: str | None = None) -> PreTrainedModel:
    """Write an adapter's tensors into a model, stock or swapped, in place; or hold them under a name.

    Args:
        model: the adapter's base.
        path: adapter folder, or a published one without a manifest.
        name: where given, the model stays as it is until ``set_adapter`` names this adapter. Without it the adapter is
            called "default", is set at once, and takes the place of an earlier "default".

    Adapters never stack: where one is set, the base's own tensors come back first. One that was trained from the
    weights that "default" has made is loaded on top of them, which are its base. Raises InputError, with nothing
    written, for a wrapped model, when the adapter is incomplete, does not fit the model, or was trained from another
    base, and for a name that is taken.
    """
    check_model(model)
    path, state = Path(path), model_state(model)
    if state.mixed is not None:
        raise InputError("the model holds adapters side by side: load them all at once")
    if state.adapters is not None and name in state.adapters.held:
        raise InputError(f"{path}: the model holds an adapter named {name!r} already")
    manifest, settles = open_adapter(path), False
    if manifest and (why := difference(manifest, partial(base_below, model))) is not None:
        # What "default" has made of a stock model can be the base of another adapter.
        alone = state.adapters is not None and state.adapters.held.keys() == {state.adapters.active}
        settles = state.swapped is None and alone and difference(manifest, partial(model_base, model)) is None
        if not settles:
            raise InputError(f"{path}: {why}")
    selection, tensors = selected_tensors(path, model)
    gone = frozenset() if manifest else state.settled  # nothing tells which base a published adapter is of
    if uncovered := sorted(gone - tensors.keys()):
        raise InputError(
            f"{path}: does not cover {uncovered[0]} ({len(uncovered)} such in all), which an adapter loaded before has "
            "changed for good, and does not say which base it is of"
        )
    with adapter_weights(path, tensors) as weights:
        values = {key: weights.get_tensor(key) for key in tensors}
    if settles:
        settle_adapter(model)
    if state.adapters is None:
        state.adapters = Adapters(base_below(model))
    if name is None:
        _switch(model, state.adapters, None)
    state.adapters.held[name or DEFAULT_ADAPTER] = selection, values
    if name is None:
        _switch(model, state.adapters, DEFAULT_ADAPTER)
    return model


def set_adapter(model: PreTrainedModel, name: str | None) -> PreTrainedModel:
    """Switch, in place, to an adapter that the model holds, or with None to the base.

    Of adapters side by side it is the one that batches without names have. What has been trained of the adapter that
    was set until now is kept under its name. Raises InputError for a name that the model does not hold.
    """
    check_model(model)
    adapters, mixed = model_state(model).adapters, model_state(model).mixed
    if mixed is not None:
        show_adapter(model, mixed, name)
        return model
    held = adapters.held if adapters is not None else {}
    if name is not None and name not in held:
        raise InputError(f"the model holds no adapter named {name!r}; it holds {sorted(held)}")
    if adapters is not None and name != adapters.active:
        _switch(model, adapters, name)
    return model


def _switch(model: PreTrainedModel, adapters: Adapters, name: str | None) -> None:
    """Give the model the base's tensors back, and then those of an adapter where one is named."""
    if adapters.active is not None:
        selection, values = adapters.held[adapters.active]
        tensors = _here(model, selection)
        kept = {key: _newer(values[key], tensor.read()) for key, tensor in tensors.items()}
        adapters.held[adapters.active] = selection, values | kept
        for key, tensor in tensors.items():
            tensor.write(adapters.base[key])
        adapters.active, adapters.base = None, {}
    if name is not None:
        selection, values = adapters.held[name]
        tensors = _here(model, selection)
        adapters.base = {key: tensor.read().to("cpu", copy=True) for key, tensor in tensors.items()}
        for key, tensor in tensors.items():
            tensor.write(values[key])
        adapters.active = name


def _here(model: PreTrainedModel, selection: ExpertSelection) -> dict[str, AdapterTensor]:
    """An adapter's tensors without those of experts that another rank holds."""
    return {key: t for key, t in adapter_tensors(model, selection).items() if not any(w.is_meta for w in t.weights)}


def _newer(held: Tensor, read: Tensor) -> Tensor:
    """What the model now has, where that is more than the tensor written to it, in a model of another dtype."""
    return held if torch.equal(held.to(read), read) else read.clone()

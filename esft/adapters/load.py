"""Loading adapters into a model, and switching between several on one base in memory."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from esft.adapters.folder import adapter_weights, check_adapter, check_model, load_selection
from esft.checkpoint.adapter_tensors import adapter_slots
from esft.checkpoint.digest import model_digest
from esft.errors import InputError
from esft.experts.model_state import DEFAULT_ADAPTER, Adapters, model_state, settle_adapter


@torch.no_grad()
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
    if state.adapters is not None and name is not None and name in state.adapters.held:
        raise InputError(f"{path}: the model holds an adapter named {name!r} already")
    manifest, settles = _checked_manifest(model, path)
    selection = load_selection(path, model)
    slots = adapter_slots(model, selection)
    gone = frozenset() if manifest else state.settled  # nothing tells which base a published adapter is of
    if uncovered := sorted(gone - slots.keys()):
        raise InputError(
            f"{path}: does not cover {uncovered[0]} ({len(uncovered)} such in all), which an adapter loaded before has "
            "changed for good, and does not say which base it is of"
        )
    with adapter_weights(path, slots) as weights:
        tensors = {key: weights.get_tensor(key) for key in slots}
    if settles:
        settle_adapter(model)
    if state.adapters is None:
        state.adapters = Adapters(_base_digest(model))
    if name is None and state.adapters.active is not None:
        set_adapter(model, None)
    state.adapters.held[name or DEFAULT_ADAPTER] = selection, tensors
    return model if name is not None else set_adapter(model, DEFAULT_ADAPTER)


def _checked_manifest(model: PreTrainedModel, path: Path) -> tuple[dict[str, Any], bool]:
    """The adapter's manifest, and whether its base is not the model's but what "default" has made of that."""
    state = model_state(model)

    def digest(rounded: torch.dtype | None) -> str:
        stock = state.swapped is None and (state.adapters is None or state.adapters.active is None)
        return model_digest(model, rounded) if stock else _base_digest(model)

    try:
        return check_adapter(path, digest, model.dtype), False
    except InputError:
        alone = state.adapters is not None and state.adapters.held.keys() == {state.adapters.active}
        if state.swapped is not None or not alone:
            raise
        try:
            return check_adapter(path, partial(model_digest, model), model.dtype), True
        except InputError:
            pass
        raise


@torch.no_grad()
def set_adapter(model: PreTrainedModel, name: str | None) -> PreTrainedModel:
    """Switch, in place, to an adapter that the model holds, or with None to the base.

    What has been trained of the adapter that was set until now is kept under its name. Raises InputError for a name
    that the model does not hold.
    """
    check_model(model)
    adapters = model_state(model).adapters
    held = adapters.held if adapters is not None else {}
    if name is not None and name not in held:
        raise InputError(f"the model holds no adapter named {name!r}; it holds {sorted(held)}")
    if adapters is None or name == adapters.active:
        return model
    if adapters.active is not None:
        selection, tensors = held[adapters.active]
        slots = adapter_slots(model, selection)
        held[adapters.active] = selection, {key: _newer(tensors[key], slot.read()) for key, slot in slots.items()}
        for key, slot in slots.items():
            slot.write(adapters.base[key])
        adapters.active, adapters.base = None, {}
    if name is not None:
        selection, tensors = held[name]
        slots = adapter_slots(model, selection)
        adapters.base = {key: slot.read().to("cpu", copy=True) for key, slot in slots.items()}
        for key, slot in slots.items():
            slot.write(tensors[key])
        adapters.active = name
    return model


def _newer(held: Tensor, read: Tensor) -> Tensor:
    """What a slot now reads, where that is more than the tensor it was written from, in a model of another dtype."""
    return held if torch.equal(held.to(read), read) else read.clone()


def _base_digest(model: PreTrainedModel) -> str:
    """Of the weights below any adapter."""
    state = model_state(model)
    known = state.adapters or state.swapped
    return known.base_digest if known is not None else model_digest(model)

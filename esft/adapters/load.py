"""Loading adapters into a model, and switching between several on one base in memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from esft.adapters.folder import adapter_weights, check_adapter, check_model, load_selection
from esft.adapters.save import Loaded, loaded_slots
from esft.checkpoint.adapter_tensors import adapter_slots
from esft.checkpoint.digest import model_digest
from esft.errors import InputError
from esft.selection import ExpertSelection
from esft.swapping.swap import swap_state

Tensors = dict[str, Tensor]


@dataclass
class Adapters:
    """The adapters that a model holds by name: kept as ``model.esft_adapters``."""

    base_digest: str
    held: dict[str, tuple[ExpertSelection, Tensors]] = field(default_factory=dict)
    active: str | None = None
    base: Tensors = field(default_factory=dict)  # the base's values where the active adapter has written its own


@torch.no_grad()
def load_adapter(model: PreTrainedModel, path: str | Path, name: str | None = None) -> PreTrainedModel:
    """Write an adapter's tensors into a model, stock or swapped, in place; or hold them under a name.

    Args:
        model: the adapter's base.
        path: adapter folder, or a published one without a manifest.
        name: where given, the model stays as it is until ``set_adapter`` names this adapter.

    Raises InputError, with nothing written, for a wrapped model, when the adapter is incomplete, does not fit the
    model, or was trained from another base, for a name that is taken, and where adapters would stack: a model loads all
    its adapters by name or all without, and then each covers what the one before it wrote (one with a manifest may also
    have been trained from the weights that the one before it left).
    """
    check_model(model)
    path, adapters = Path(path), _adapters(model)
    if adapters is not None and name in adapters.held:
        raise InputError(f"{path}: the model holds an adapter named {name!r} already")
    if adapters is not None and name is None:
        raise InputError(f"{path}: the model holds {sorted(adapters.held)} by name; load this one under a name too")
    digest = _base_digest(model)
    held = swap_state(model) is not None or adapters is not None  # whose base can no longer be read
    manifest = check_adapter(path, lambda to: digest if held or to is None else model_digest(model, to), model.dtype)
    loaded = loaded_slots(model, digest if manifest else None)
    if loaded and name is not None:
        raise InputError(f"{path}: an adapter was loaded without a name, so the base that {name!r} is for is gone")
    selection = load_selection(path, model)
    slots = adapter_slots(model, selection)
    if uncovered := sorted(loaded - slots.keys()):
        raise InputError(
            f"{path}: does not cover {uncovered[0]} ({len(uncovered)} such in all), which the adapter loaded before "
            "has changed; load adapters under names to switch between them"
        )
    with adapter_weights(path, slots) as weights:
        tensors = {key: weights.get_tensor(key) for key in slots}
    if name is None:
        for key, slot in slots.items():
            slot.write(tensors[key])
        model.esft_loaded = Loaded(digest, frozenset(slots), loaded_slots(model, None) | slots.keys())
        return model
    if adapters is None:
        adapters = model.esft_adapters = Adapters(digest)
    adapters.held[name] = selection, tensors
    return model


@torch.no_grad()
def set_adapter(model: PreTrainedModel, name: str | None) -> PreTrainedModel:
    """Switch, in place, to an adapter that the model holds, or with None to the base.

    What has been trained of the adapter that was set until now is kept under its name. Raises InputError for a name
    that the model does not hold.
    """
    check_model(model)
    adapters = _adapters(model)
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
        adapters.base = {key: slot.read().clone() for key, slot in slots.items()}
        for key, slot in slots.items():
            slot.write(tensors[key])
        adapters.active = name
    return model


def _newer(held: Tensor, read: Tensor) -> Tensor:
    """What a slot now reads, where that is more than the tensor it was written from, in a model of another dtype."""
    return held if torch.equal(held.to(read), read) else read.clone()


def _adapters(model: PreTrainedModel) -> Adapters | None:
    return getattr(model, "esft_adapters", None)


def _base_digest(model: PreTrainedModel) -> str:
    adapters, state = _adapters(model), swap_state(model)
    if adapters is not None:
        return adapters.base_digest
    return state.base_digest if state is not None else model_digest(model)

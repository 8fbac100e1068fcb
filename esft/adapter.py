"""Adapters: the trained tensors alone, under the checkpoint's own names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from esft.checkpoint import model_digest
from esft.errors import InputError
from esft.families import moe_layers, routed_parameters
from esft.files import new_folder, open_safetensors, read_json, write_json
from esft.select import ExpertSelection
from esft.stored import ExpertTensor, expert_tensors, expert_weight, stored_names
from esft.swap import swap_state

WEIGHTS = "adapter.safetensors"
SELECTION = "expert_cfg.json"
MANIFEST = "manifest.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Slot:
    """Where in a model a tensor of an adapter belongs: a weight, and of an expert's weight the part that is stored."""

    weight: Tensor
    part: ExpertTensor | None = None

    def read(self) -> Tensor:
        return self.weight if self.part is None else self.part.read(self.weight)

    def write(self, value: Tensor) -> None:
        if self.part is None:
            self.weight.copy_(value)
        else:
            self.part.write(self.weight, value)


def adapter_slots(model: PreTrainedModel, selection: ExpertSelection) -> dict[str, Slot]:
    """Everything that the selection trains, by its name in an adapter; of a stock or a swapped model."""
    layers, slots = moe_layers(model), {}
    by_index = {layer.index: layer for layer in layers}
    chosen = {index: set(ids) for index, ids in selection.experts.items()}
    for tensor in expert_tensors(model) if any(chosen.values()) else ():
        if tensor.expert in chosen.get(tensor.layer, ()):
            slots[tensor.name] = Slot(expert_weight(model, by_index[tensor.layer], tensor), tensor)
    routed = {p for layer in layers for p in routed_parameters(layer)}
    shared = {p for layer in layers for m in layer.shared_experts for p in m.parameters()}
    others = {
        name: parameter.detach()
        for name, parameter in model.named_parameters()
        if parameter not in routed
        and (selection.shared_experts if parameter in shared else selection.non_expert_modules)
    }
    for name, stored in stored_names(model, list(others)).items():
        slots[stored] = Slot(others[name])
    return slots


def save_adapter(model: PreTrainedModel, path: str | Path, overwrite: bool = False) -> Path:
    """Write the trained tensors of a swapped model: selection, safetensors and a manifest.

    Raises InputError for a stock model, and for a folder that holds something already unless ``overwrite``.
    """
    state = swap_state(model)
    if state is None:
        raise InputError("only a swapped model has an adapter to save")
    with new_folder(path, overwrite) as folder:
        state.selection.save(folder / SELECTION)
        slots = adapter_slots(model, state.selection)
        tensors = {name: slot.read().contiguous().cpu() for name, slot in slots.items()}
        save_file(tensors, folder / WEIGHTS, {"format": "pt"})
        write_manifest(folder, model, state.base_digest, state.selection.chosen_by)
    return Path(path)


def write_manifest(folder: Path, model: PreTrainedModel, base_digest: str, chosen_by: dict[str, Any]) -> None:
    """What an adapter was trained from, and how its experts were chosen."""
    values = {"format_version": FORMAT_VERSION, "base_model": model.config._name_or_path, "base_digest": base_digest}
    write_json(folder / MANIFEST, values | {"chosen_by": chosen_by})


def read_manifest(path: str | Path) -> dict[str, Any]:
    """The manifest of an adapter folder. Raises InputError naming what is missing or not understood."""
    path = Path(path)
    for name in (SELECTION, MANIFEST, WEIGHTS):
        if not (path / name).is_file():
            raise InputError(f"{path}: not an adapter folder (no {name})")
    return open_manifest(path)


def open_manifest(path: Path) -> dict[str, Any]:
    """The manifest alone, of an adapter of any kind. Raises InputError for one of another format."""
    manifest = read_json(path / MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("format_version") != FORMAT_VERSION:
        raise InputError(f"{path / MANIFEST}: format_version must be {FORMAT_VERSION}")
    return manifest


def check_digest(manifest: dict[str, Any], digest: str, adapter: str | Path) -> None:
    """Raise InputError unless the adapter's manifest names these weights."""
    if manifest.get("base_digest") != digest:
        raise InputError(
            f"{adapter}: made from another base ({manifest.get('base_model')}, digest "
            f"{str(manifest.get('base_digest'))[:12]}), not from these weights ({digest[:12]})"
        )


def check_tensors(path: Path, found: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]]) -> None:
    """Raise InputError unless an adapter's tensors are exactly the wanted ones; names -> shapes."""
    if missing := sorted(wanted.keys() - found.keys()):
        raise InputError(f"{path}: tensor {missing[0]} is missing ({len(missing)} missing in all)")
    if extra := sorted(found.keys() - wanted.keys()):
        raise InputError(f"{path}: tensor {extra[0]} belongs to nothing selected ({len(extra)} such in all)")
    for name, shape in wanted.items():
        if found[name] != shape:
            raise InputError(f"{path}: tensor {name} has shape {found[name]}, the base has {shape}")


def check_adapter(path: Path, digest: Callable[[], str]) -> dict[str, Any]:
    """The manifest of an adapter folder, held against the digest of the base."""
    manifest = read_manifest(path)
    check_digest(manifest, digest(), path)
    return manifest


@contextmanager
def adapter_weights(path: Path, slots: dict[str, Slot]) -> Iterator[Any]:
    """An adapter's open weights. Raises InputError unless its tensors are exactly those that the slots are for."""
    with open_safetensors(path / WEIGHTS) as handle:
        found = {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}  # noqa: SIM118
        check_tensors(path / WEIGHTS, found, {name: tuple(slot.read().shape) for name, slot in slots.items()})
        yield handle


@torch.no_grad()
def load_adapter(model: PreTrainedModel, path: str | Path) -> PreTrainedModel:
    """Write an adapter's tensors into a model, stock or swapped, in place.

    Raises InputError, with nothing written, when the adapter is incomplete, does not fit the model, or was trained from
    another base.
    """
    path, state = Path(path), swap_state(model)
    check_adapter(path, lambda: state.base_digest if state else model_digest(model))
    selection = ExpertSelection.load(path / SELECTION)
    selection.check({layer.index: layer.num_experts for layer in moe_layers(model)})
    slots = adapter_slots(model, selection)
    with adapter_weights(path, slots) as handle:
        tensors = {name: handle.get_tensor(name) for name in slots}
    for name, slot in slots.items():
        slot.write(tensors[name])
    return model

"""Adapters: the trained tensors alone, under the checkpoint's own names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from esft.checkpoint import model_digest
from esft.errors import InputError
from esft.families import checkpoint_name, expert_tensor_name, model_family, moe_layers
from esft.files import new_folder, open_safetensors, read_json, write_json
from esft.moe import Experts
from esft.select import ExpertSelection
from esft.swap import swap_state

WEIGHTS = "adapter.safetensors"
SELECTION = "expert_cfg.json"
MANIFEST = "manifest.json"
FORMAT_VERSION = 1


def adapter_tensors(model: PreTrainedModel, selection: ExpertSelection) -> dict[str, Tensor]:
    """Views of everything that the selection trains, by checkpoint name; of a stock or a swapped model."""
    family, tensors = model_family(model), {}
    swapped = swap_state(model) is not None
    for layer in moe_layers(model):
        for expert in selection.experts.get(layer.index, []):
            if swapped:
                assert isinstance(layer.experts, Experts)
                # The pools of a swapped model may be ordered by another selection than this one.
                weights = layer.experts.pools.at(int(layer.experts.position[expert]))
                gate_up, down = weights.gate_up_EGD, weights.down_EDF
            else:
                gate_up, down = layer.experts.gate_up_proj[expert], layer.experts.down_proj[expert]
            for projection, tensor in enumerate((*gate_up.chunk(2), down)):
                tensors[expert_tensor_name(layer.name, expert, projection, family)] = tensor.detach()
    shared = {p for layer in moe_layers(model) for m in layer.shared_experts for p in m.parameters()}
    routed = {p for layer in moe_layers(model) for p in layer.experts.parameters()}
    for name, parameter in model.named_parameters():
        if parameter in routed:
            continue
        if (parameter in shared and selection.shared_experts) or (
            parameter not in shared and selection.non_expert_modules
        ):
            tensors[checkpoint_name(name, family)] = parameter.detach()
    return tensors


def save_adapter(model: PreTrainedModel, path: str | Path, overwrite: bool = False) -> Path:
    """Write the trained tensors of a swapped model: selection, safetensors and a manifest.

    Raises InputError for a stock model, and for a folder that holds something already unless ``overwrite``.
    """
    state = swap_state(model)
    if state is None:
        raise InputError("only a swapped model has an adapter to save")
    with new_folder(path, overwrite) as folder:
        state.selection.save(folder / SELECTION)
        tensors = {name: t.contiguous().cpu() for name, t in adapter_tensors(model, state.selection).items()}
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


@torch.no_grad()
def load_adapter(model: PreTrainedModel, path: str | Path) -> PreTrainedModel:
    """Write an adapter's tensors into a model, stock or swapped, in place.

    Raises InputError, with nothing written, when the adapter is incomplete, does not fit the model, or was trained from
    another base.
    """
    path = Path(path)
    manifest = read_manifest(path)
    selection = ExpertSelection.load(path / SELECTION)
    selection.check({layer.index: layer.num_experts for layer in moe_layers(model)})
    state = swap_state(model)
    check_digest(manifest, state.base_digest if state else model_digest(model), path)
    targets = adapter_tensors(model, selection)
    with open_safetensors(path / WEIGHTS) as handle:
        found = {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}  # noqa: SIM118
        check_tensors(path / WEIGHTS, found, {name: tuple(t.shape) for name, t in targets.items()})
        tensors = {name: handle.get_tensor(name) for name in found}
    for name, target in targets.items():
        target.copy_(tensors[name])
    return model

"""Adapters: the trained tensors alone, under the checkpoint's own names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file
from transformers import PreTrainedModel

from esft.adapters.folder import MANIFEST, SELECTION, WEIGHTS, check_model, write_manifest
from esft.checkpoint.adapter_tensors import adapter_slots
from esft.errors import InputError
from esft.files import check_earlier, new_folder
from esft.swapping.swap import swap_state


@dataclass(frozen=True)
class Loaded:
    """The slots that adapters loaded without a name have written into a base: kept as ``model.esft_loaded``.

    ``slots`` are of the base with this digest; ``ever`` adds those that were written before it became this base.
    """

    base_digest: str
    slots: frozenset[str]
    ever: frozenset[str]


def loaded_slots(model: PreTrainedModel, base_digest: str | None) -> frozenset[str]:
    """Where the model no longer has the values of the base with this digest, because of a load without a name.

    Without a digest: of the base that the model was before all loads, as nothing tells that a later one is meant.
    """
    loaded = getattr(model, "esft_loaded", None)
    if loaded is None:
        return frozenset()
    if base_digest is None:
        return loaded.ever
    return loaded.slots if loaded.base_digest == base_digest else frozenset()


def save_adapter(model: PreTrainedModel, path: str | Path, overwrite: bool = False) -> Path:
    """Write the trained tensors of a swapped model: selection, safetensors and a manifest.

    Args:
        model: a swapped model.
        path: folder to write.
        overwrite: replace an earlier adapter that ``path`` holds; nothing else is replaced.

    Raises InputError for a stock model, for a wrapped one, for one where another adapter has written what the selection
    does not cover, where another library has exchanged modules that the selection trains, for a folder that holds
    something already, and for a full disk; then no file is left.
    """
    check_model(model)
    state = swap_state(model)
    if state is None:
        raise InputError("only a swapped model has an adapter to save")
    slots = adapter_slots(model, state.selection)
    adapters = getattr(model, "esft_adapters", None)
    written = loaded_slots(model, state.base_digest) | (adapters.base.keys() if adapters is not None else set())
    if uncovered := sorted(written - slots.keys()):
        raise InputError(
            f"a loaded adapter has changed {uncovered[0]}, which is not in the model's selection ({len(uncovered)} "
            "such in all): what is saved would be incomplete"
        )
    if foreign := {p.parameter for slot in slots.values() for p in slot.pieces} - state.required_grad.keys():
        raise InputError(
            f"{min(foreign)}: is not of the model that was swapped, but the selection's non-expert modules hold it: "
            "take out what another library has put in (PEFT: merge_and_unload or unload) before saving the adapter"
        )
    if overwrite:
        check_earlier(path, "adapter", SELECTION, MANIFEST)
    with new_folder(path, overwrite) as folder:
        state.selection.save(folder / SELECTION)
        tensors = {name: slot.read().contiguous().cpu() for name, slot in slots.items()}
        save_file(tensors, folder / WEIGHTS, {"format": "pt"})
        write_manifest(folder, model, state.base_digest, state.selection.chosen_by)
    return Path(path)

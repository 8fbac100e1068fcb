"""Adapters: the trained tensors alone, under the checkpoint's own names."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file
from transformers import PreTrainedModel

from esft.adapters.folder import MANIFEST, SELECTION, WEIGHTS, check_model, write_manifest
from esft.checkpoint.adapter_tensors import adapter_tensors
from esft.errors import InputError
from esft.experts.model_state import known_state
from esft.files import check_earlier, new_folder


def save_adapter(model: PreTrainedModel, path: str | Path, overwrite: bool = False) -> Path:
    """Write the trained tensors of a swapped model: selection, safetensors and a manifest.

    Args:
        model: a swapped model.
        path: folder to write.
        overwrite: replace an earlier adapter that ``path`` holds; nothing else is replaced.

    Raises InputError for a stock model, for a wrapped one, for one where another adapter has written what the selection
    does not cover, where another library has exchanged modules that the selection trains, and for a folder that holds
    something already; DiskError for a full disk. Then no file is left.
    """
    check_model(model)
    state = known_state(model)
    swapped, adapters = state.swapped, state.adapters
    if swapped is None:
        raise InputError("only a swapped model has an adapter to save")
    tensors = adapter_tensors(model, swapped.selection)
    if uncovered := sorted(adapters.base.keys() - tensors.keys()) if adapters is not None else []:
        raise InputError(
            f"a loaded adapter has changed {uncovered[0]}, which is not in the model's selection ({len(uncovered)} "
            "such in all): what is saved would be incomplete"
        )
    if (
        foreign := {link.parameter for tensor in tensors.values() for link in tensor.stored.links}
        - swapped.required_grad.keys()
    ):
        raise InputError(
            f"{min(foreign)}: is not of the model that was swapped, but the selection's non-expert modules hold it: "
            "take out what another library has put in (PEFT: merge_and_unload or unload) before saving the adapter"
        )
    if overwrite:
        check_earlier(path, "adapter", SELECTION, MANIFEST)
    with new_folder(path, overwrite) as folder:
        swapped.selection.save(folder / SELECTION)
        values = {name: tensor.read().contiguous().cpu() for name, tensor in tensors.items()}
        save_file(values, folder / WEIGHTS, {"format": "pt"})
        write_manifest(folder, swapped.base, swapped.selection.chosen_by)
    return Path(path)

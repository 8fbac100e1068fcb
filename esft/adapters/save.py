"""Adapters: the trained tensors alone, under the checkpoint's own names."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from esft.adapters.folder import MANIFEST, SELECTION, WEIGHTS, check_model, open_manifest, write_manifest
from esft.checkpoint.adapter_tensors import AdapterTensor, adapter_tensors
from esft.errors import InputError
from esft.experts.model_state import known_state
from esft.experts.moe_layers import is_dealt, ranks_of
from esft.parallel.ranks import ALONE, Ranks
from esft.storage.outputs import new_folder


def save_adapter(model: PreTrainedModel, path: str | Path, overwrite: bool = False) -> Path:
    """Write the trained tensors of a swapped model: selection, safetensors and a manifest.

    Args:
        model: a swapped model.
        path: folder to write.
        overwrite: replace an earlier adapter that ``path`` holds, if it holds nothing else.

    Where processes hold some of the experts each, all of them have to call this, and the first one writes.

    Raises InputError for a stock model, for a wrapped one, for one where another adapter has written what the selection
    does not cover, where another library has exchanged modules that the selection trains, and for a folder that holds
    something else or that another process writes; RankError outside of the job that holds the experts, DiskError for a
    full disk. Then no file is left.
    """
    ranks = ranks_of(model) if is_dealt(model) else ALONE
    with new_folder(path, _earlier if overwrite else None) if ranks.main else nullcontext() as folder:
        write_adapter(model, folder)
    ranks.wait()
    return Path(path)


def _earlier(path: Path) -> set[str]:
    """The files of an earlier adapter. Raises InputError where none is, or one that is not ours."""
    if not (path / MANIFEST).is_file():
        raise InputError(f"{path}: holds no earlier adapter (no {MANIFEST}), and is not overwritten")
    open_manifest(path)
    return {SELECTION, WEIGHTS, MANIFEST}


def write_adapter(model: PreTrainedModel, folder: Path | None) -> None:
    """``save_adapter`` into a folder that is empty; None on a rank that only hands over what it holds."""
    check_model(model)
    state = known_state(model)
    swapped, adapters = state.swapped, state.adapters
    if swapped is None:
        raise InputError("only a swapped model has an adapter to save")
    if state.mixed is not None and state.mixed.active is None:
        raise InputError("the model holds adapters side by side: set_adapter(model, NAME) says which one to save")
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
    dealt = is_dealt(model)
    if folder is None and not dealt:
        return
    values = _values(tensors, ranks_of(model) if dealt else ALONE)
    if folder is None:
        return
    swapped.selection.save(folder / SELECTION)
    save_file(values, folder / WEIGHTS, {"format": "pt"})
    kept_in = {"frozen": swapped.frozen, "frozen_linear": swapped.frozen_linear}
    write_manifest(folder, swapped.base, swapped.selection.chosen_by, kept_in)


def _values(tensors: Mapping[str, AdapterTensor], ranks: Ranks) -> dict[str, Tensor]:
    """All values on the first rank, which gets those of experts that it does not hold from who does."""
    own = {name: tensor.read().contiguous() for name, tensor in tensors.items()}
    lacks = set(ranks.told(lambda: [name for name, value in own.items() if value.is_meta]))
    found = ranks.collected({name: value for name, value in own.items() if name in lacks and not value.is_meta})
    return {name: found[name][0] if name in found else value for name, value in own.items()}

"""Merging an adapter into a checkpoint, file by file."""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors.torch import save_file

from esft.adapter import MANIFEST, SELECTION, WEIGHTS, check_digest, check_tensors, read_manifest
from esft.checkpoint import Checkpoint
from esft.errors import InputError
from esft.families import expert_tensor_name
from esft.files import check_apart, new_folder, open_safetensors
from esft.select import ExpertSelection

MERGED = f"esft_{MANIFEST}"  # in a merged checkpoint: the manifest of the adapter that went into it


def merge(base: str | Path, adapter: str | Path, out: str | Path, overwrite: bool = False) -> Path:
    """Write a checkpoint with the adapter's tensors in the place of the base's.

    Works a file at a time. Tensors that the adapter does not hold, and all other files, are copied as they are; the
    adapter's are stored in the dtype that the base has there. The output appears whole or not at all.

    Args:
        base: checkpoint folder.
        adapter: adapter folder.
        out: folder to write.
        overwrite: replace an earlier merge that ``out`` holds; nothing else is replaced.

    Raises InputError for an adapter of another base, for tensors that are missing or do not fit, and for an output
    folder that holds something already.
    """
    base, adapter, out = Path(base), Path(adapter), Path(out)
    check_apart(out, base, adapter)
    if overwrite and out.is_dir() and any(out.iterdir()) and not (out / MERGED).is_file():
        raise InputError(f"{out}: holds no earlier merge (no {MERGED}), and is not overwritten")
    checkpoint = Checkpoint.open(base)
    manifest = read_manifest(adapter)
    selection = ExpertSelection.load(adapter / SELECTION)
    check_digest(manifest, checkpoint.digest(), adapter)
    with open_safetensors(adapter / WEIGHTS) as tuned:
        shapes = {name: tuple(tuned.get_slice(name).get_shape()) for name in tuned.keys()}  # noqa: SIM118
        _check(checkpoint, selection, adapter, shapes)
        with new_folder(out, overwrite) as folder:
            for source in base.iterdir():
                if source.is_file() and source.name not in set(checkpoint.files.values()):
                    shutil.copy2(source, folder / source.name)
            for file in sorted(set(checkpoint.files.values())):
                with checkpoint.read(file) as handle:
                    tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
                    metadata = handle.metadata()
                for name in tensors.keys() & shapes.keys():
                    tensors[name] = tuned.get_tensor(name).to(tensors[name].dtype)
                save_file(tensors, folder / file, metadata)
            shutil.copy2(adapter / MANIFEST, folder / MERGED)
    return out


def _check(
    checkpoint: Checkpoint, selection: ExpertSelection, adapter: Path, shapes: dict[str, tuple[int, ...]]
) -> None:
    """The adapter holds just what its selection says, in the shapes that the base has."""
    wanted = {name for name in checkpoint.files if checkpoint.belongs(name) and _trains(name, selection)}
    # A prefix such as "model.layers" differs between families, so the layer's path is read off the base's names.
    paths = {name.split(".experts.")[0] for name in checkpoint.files if ".experts." in name}
    for layer, ids in selection.experts.items():
        path = next((p for p in paths if f".layers.{layer}." in f".{p}."), None)
        if path is None:
            raise InputError(f"{adapter}: selection names layer {layer}, which has no experts in {checkpoint.folder}")
        for expert in ids:
            for projection in range(3):
                name = expert_tensor_name(f"{path}.experts", expert, projection, checkpoint.family)
                if name not in checkpoint.files:
                    raise InputError(f"{adapter}: selection names expert {expert} of layer {layer}, not in the base")
                wanted.add(name)
    base_shapes = {}
    for file in sorted({checkpoint.files[name] for name in wanted}):
        with checkpoint.read(file) as handle:
            for name in wanted & set(handle.keys()):
                base_shapes[name] = tuple(handle.get_slice(name).get_shape())
    check_tensors(adapter / WEIGHTS, shapes, base_shapes)


def _trains(name: str, selection: ExpertSelection) -> bool:
    """Whether a tensor that belongs to no routed expert is part of the selection."""
    if ".experts." in name or name.endswith("e_score_correction_bias"):  # which no gradient trains
        return False
    return selection.shared_experts if ".shared_expert" in name else selection.non_expert_modules

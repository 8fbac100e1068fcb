"""Merging an adapter into a checkpoint, file by file."""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors.torch import save_file

from esft.adapter import MANIFEST, SELECTION, WEIGHTS, check_digest, check_tensors, read_manifest
from esft.checkpoint import Checkpoint
from esft.errors import InputError
from esft.families import expert_tensor_name
from esft.files import new_folder, open_safetensors
from esft.select import ExpertSelection


def merge(base: str | Path, adapter: str | Path, out: str | Path, overwrite: bool = False) -> Path:
    """Write a checkpoint with the adapter's tensors in the place of the base's.

    Works a file at a time. Tensors that the adapter does not hold, and all other files, are copied as they are; the
    adapter's are stored in the dtype that the base has there. The output appears whole or not at all.

    Raises InputError for an adapter of another base, for tensors that do not fit, and for an output folder that holds
    something already unless ``overwrite``.
    """
    base, adapter, out = Path(base), Path(adapter), Path(out)
    if out.resolve() in (base.resolve(), adapter.resolve()):
        raise InputError(f"{out}: the output cannot be the base or the adapter")
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
            shutil.copy2(adapter / MANIFEST, folder / f"esft_{MANIFEST}")
    return out


def _check(
    checkpoint: Checkpoint, selection: ExpertSelection, adapter: Path, shapes: dict[str, tuple[int, ...]]
) -> None:
    """The adapter holds every selected expert, and nothing that the base lacks."""
    wanted = {}
    for file in sorted(set(checkpoint.files.values())):
        with checkpoint.read(file) as handle:
            for name in handle.keys():  # noqa: SIM118
                if name in shapes:
                    wanted[name] = tuple(handle.get_slice(name).get_shape())
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
                wanted.setdefault(name, ())
    check_tensors(adapter / WEIGHTS, shapes, wanted)

"""Merging an adapter into a checkpoint: the files are copied, and the tuned bytes written into the copies."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers.utils.hub import CHAT_TEMPLATE_DIR

from esft.adapters.folder import MANIFEST, AdapterWeights, adapter_weights, check_adapter, load_selection
from esft.checkpoint.adapter_tensors import Place, Slot, adapter_slots
from esft.checkpoint.folder import Checkpoint
from esft.errors import DiskError, InputError
from esft.files import Stored, check_apart, check_earlier, new_folder, write_json

MERGED = f"esft_{MANIFEST}"  # in a merged checkpoint: the manifest of the adapter that went into it
OTHER_FORMATS = ("pytorch_model*.bin*", "tf_model*.h5*", "flax_model*.msgpack*", "consolidated*", "*.gguf")
CHUNK = 1 << 24  # bytes compared at a time
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass
class _Patch:
    """Bytes ``start:end`` of a file, a tensor or a slice of one, that an adapter's tensors replace all or a part of."""

    start: int
    end: int
    shape: tuple[int, ...]
    dtype: torch.dtype  # that the base has there
    changes: list[tuple[str, Place]]  # the adapter's tensors

    def content(self, base: bytes, tuned: AdapterWeights) -> bytes:
        """What takes the place of the base's bytes. Raises InputError for values that the base's dtype cannot hold."""
        if not base:  # a tensor without elements, of which torch makes no buffer
            return base
        block = bytearray(base)
        tensor = torch.frombuffer(block, dtype=self.dtype).view(self.shape)
        for name, place in self.changes:
            value = tuned.get_tensor(name)
            if (held := value.to(self.dtype)).isinf().any() and not value.isinf().any():
                raise InputError(f"adapter's tensor {name} has values beyond {self.dtype}, which the base has there")
            place.put(tensor, held)
        return bytes(block)


def merge(base: str | Path, adapter: str | Path, out: str | Path, overwrite: bool = False) -> Path:
    """Write a checkpoint with the adapter's tensors in the place of the base's.

    The files are copied and then patched, so that all other bytes, headers and index included, are those of the base,
    and no more than one tensor of the adapter is in memory. Where the base stacks its experts, their slices are
    replaced; it may hold its tensors in the original format or as the model does (``save_original_format=False``). The
    result is read back and compared before it appears under its name. Left out is what has the base's weights in other
    formats, as they would be loaded for the tuned ones, and subfolders but for that of chat templates.

    Args:
        base: checkpoint folder.
        adapter: adapter folder.
        out: folder to write.
        overwrite: replace an earlier merge that ``out`` holds; nothing else is replaced.

    Raises InputError for an adapter of another base, for tensors that are missing or do not fit, for an output folder
    that holds something already; DiskError for a disk that is full or does not keep what was written.
    """
    base, adapter, out = Path(base), Path(adapter), Path(out)
    check_apart(out, base, adapter)
    if overwrite:
        check_earlier(out, "merge", MERGED)
    checkpoint = Checkpoint.open(base)
    manifest = check_adapter(adapter, checkpoint.digest, checkpoint.dtype)
    skeleton = checkpoint.skeleton
    slots = adapter_slots(skeleton, load_selection(adapter, skeleton))
    with adapter_weights(adapter, slots) as tuned:
        patches = _patches(checkpoint, slots)
        with new_folder(out, overwrite) as folder:
            for source in _to_copy(checkpoint):
                target = folder / source.relative_to(base)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(source, target)  # the content of a link, and without its mode: it may be read-only
            for file, changes in patches.items():
                with open(folder / file, "r+b") as handle:
                    for patch in changes:
                        handle.seek(patch.start)
                        content = patch.content(handle.read(patch.end - patch.start), tuned)
                        handle.seek(patch.start)
                        handle.write(content)
            for file in sorted(set(checkpoint.files.values())):
                _verify(base / file, folder / file, patches.get(file, []), tuned)
            write_json(folder / MERGED, manifest)
    return out


def _to_copy(checkpoint: Checkpoint) -> Iterator[Path]:
    weights = set(checkpoint.files.values())
    for path in sorted(checkpoint.folder.iterdir()):
        if path.is_file() and (path.name in weights or not any(path.match(p) for p in OTHER_FORMATS)):
            yield path
    if (templates := checkpoint.folder / CHAT_TEMPLATE_DIR).is_dir():
        yield from sorted(path for path in templates.iterdir() if path.is_file())


def _patches(checkpoint: Checkpoint, slots: dict[str, Slot]) -> dict[str, list[_Patch]]:
    """File -> what changes in it, in file order. Raises InputError for a tensor that has no place in the base."""
    patches: dict[str, dict[int, _Patch]] = {}  # file -> where it begins -> the patch
    for name, slot in slots.items():
        for place in slot.places(checkpoint.as_in_memory):
            if not (own_names := checkpoint.names_of(place.name)):
                raise InputError(f"{checkpoint.folder}: holds no tensor {place.name}, which the adapter changes")
            for own in own_names:
                file = checkpoint.files[own]
                patch = _patch(checkpoint.stored(own), place, f"{checkpoint.folder / file}: tensor {own}")
                patches.setdefault(file, {}).setdefault(patch.start, patch).changes.append((name, place))
    return {file: [changes[start] for start in sorted(changes)] for file, changes in patches.items()}


def _patch(stored: Stored, place: Place, where: str) -> _Patch:
    shape, count = (stored.shape, 1) if place.index is None else (stored.shape[1:], stored.shape[0])
    if shape != place.shape:
        raise InputError(f"{where} has shape {stored.shape}, which is not the model's")
    if stored.dtype not in DTYPES:
        raise InputError(f"{where} is {stored.dtype}; only {', '.join(DTYPES)} can be merged into")
    size = (stored.end - stored.start) // count
    start = stored.start + size * (place.index or 0)
    return _Patch(start, start + size, shape, DTYPES[stored.dtype], [])


def _verify(before: Path, after: Path, patches: list[_Patch], tuned: AdapterWeights) -> None:
    """Raise DiskError unless a written file holds the tuned bytes where it should and the base's everywhere else."""
    with open(before, "rb") as old, open(after, "rb") as new:
        place = 0
        for patch in [*patches, None]:
            end = patch.start if patch else before.stat().st_size
            while place < end:
                step = min(CHUNK, end - place)
                if old.read(step) != new.read(step):
                    raise DiskError(f"{after.name}: reads back other bytes than were written (is the disk sound?)")
                place += step
            if patch:
                place, size = patch.end, patch.end - patch.start
                if new.read(size) != patch.content(old.read(size), tuned):
                    names = ", ".join(name for name, _ in patch.changes)
                    raise DiskError(f"{after.name}: tensor {names} reads back otherwise than it was written")
        if new.read(1):
            raise DiskError(f"{after.name}: is longer than the base's file")

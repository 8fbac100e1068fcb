"""Merging an adapter into a checkpoint: the files are copied, and the tuned bytes written into the copies."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from esft.adapters.folder import (
    MANIFEST,
    AdapterWeights,
    adapter_weights,
    check_base,
    open_adapter,
    selected_tensors,
)
from esft.checkpoint.adapter_tensors import AdapterTensor
from esft.checkpoint.folder import Checkpoint
from esft.checkpoint.source import downloaded
from esft.checkpoint.views import Link
from esft.errors import DiskError, InputError
from esft.storage.files import FLOATS, TensorInfo, write_json
from esft.storage.outputs import check_apart, check_new_folder, entries, new_folder
from esft.storage.reading import read_json
from esft.transformers_internals import CHAT_TEMPLATE_DIR

MERGED = f"esft_{MANIFEST}"  # in a merged checkpoint: the manifest of the adapter that went into it
FILES = "files"  # there also: what the checkpoint consists of
OTHER_FORMATS = ("pytorch_model*.bin*", "tf_model*.h5*", "flax_model*.msgpack*", "consolidated*", "*.gguf")
CHUNK = 1 << 24  # bytes compared at a time
DTYPES = dict(zip(FLOATS, (torch.float64, torch.float32, torch.float16, torch.bfloat16), strict=True))


@dataclass
class _Patch:
    """A tensor of the base's files, or a slice of one, that an adapter's tensors replace all or a part of."""

    file: str
    name: str
    info: TensorInfo
    start: int  # bytes of the file
    end: int
    shape: tuple[int, ...]
    changes: list[tuple[str, Link]]  # the adapter's tensors

    def content(self, base: bytes, tuned: AdapterWeights) -> bytes:
        """What takes the place of the base's bytes. Raises InputError for values that the base's dtype cannot hold."""
        if not base:  # a tensor without elements, of which torch makes no buffer
            return base
        block, dtype = bytearray(base), DTYPES[self.info.dtype]
        tensor = torch.frombuffer(block, dtype=dtype).view(self.shape)
        for name, link in self.changes:
            value = tuned.get_tensor(name)
            if (held := value.to(dtype)).isinf().any():
                raise InputError(f"adapter's tensor {name} has values beyond {dtype}, which the base has there")
            link.load(tensor, held)
        return bytes(block)


def merge(
    base: str | Path, adapter: str | Path, out: str | Path, overwrite: bool = False, trust_remote_code: bool = False
) -> Path:
    """Write a checkpoint with the adapter's tensors in the place of the base's.

    The files are copied and then patched, so that all other bytes, headers and index included, are those of the base,
    and no more than one tensor of the adapter is in memory. Where the base stacks its experts, their slices are
    replaced; it may hold its tensors in the original format or as the model does (``save_original_format=False``).
    Values are rounded to the base's dtype; where that leaves nothing of the adapter, a warning says so. The result is
    read back and compared before it appears under its name. Left out is what has the base's weights in other formats,
    as they would be loaded for the tuned ones, and subfolders but for that of chat templates.

    Args:
        base: checkpoint folder or hub id.
        adapter: adapter folder.
        out: folder to write.
        overwrite: replace an earlier merge that ``out`` holds, if it holds nothing else.
        trust_remote_code: whether Python files of the checkpoint may be run.

    Raises InputError for an adapter of another base, for tensors that are missing or do not fit, for an output folder
    that holds something else or that another process writes; DiskError for a disk that is full or does not keep what
    was written.
    """
    adapter, out = Path(adapter), Path(out)
    check_apart(out, base, adapter)
    earlier = _earlier if overwrite else None
    check_new_folder(out, earlier)
    checkpoint = Checkpoint.open(downloaded(base), trust_remote_code)
    if manifest := open_adapter(adapter):
        _check_base(manifest, checkpoint, adapter)
    _, tensors = selected_tensors(adapter, checkpoint.skeleton)
    plan = _plan(checkpoint, tensors)
    _validate(plan, checkpoint)
    with adapter_weights(adapter, tensors) as tuned, new_folder(out, earlier) as folder:
        for source in _to_copy(checkpoint):
            target = folder / source.relative_to(checkpoint.folder)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(source, target)  # the content of a link, and without its mode: it may be read-only
        changed = [_apply(folder / file, patches, tuned) for file, patches in plan.items()]
        if not any(changed):
            warnings.warn(f"{adapter}: changes nothing: in the dtype of {base} its values are the base's", stacklevel=2)
        for file, patches in plan.items():
            _verify(checkpoint.folder / file, folder / file, patches, tuned)
        write_json(folder / MERGED, manifest | {FILES: sorted({*entries(folder), MERGED})})
    return out


def _check_base(manifest: dict[str, Any], checkpoint: Checkpoint, adapter: Path) -> None:
    """Raise InputError unless the adapter is of this base; one that lacks a tensor is told of as such."""
    try:
        check_base(manifest, checkpoint.base, adapter)
    except InputError as error:
        if (why := checkpoint.misfit()) is not None:
            raise InputError(f"{checkpoint.folder}: {why}") from error
        raise


def _earlier(out: Path) -> set[str]:
    """The files of an earlier merge. Raises InputError where none is."""
    if not (out / MERGED).is_file():
        raise InputError(f"{out}: holds no earlier merge (no {MERGED}), and is not overwritten")
    marker = read_json(out / MERGED)
    files = marker.get(FILES) if isinstance(marker, dict) else None
    if not isinstance(files, list) or not all(isinstance(file, str) for file in files):
        raise InputError(f"{out / MERGED}: does not say which files are of the merge: it is not overwritten; remove it")
    return set(files)


def _to_copy(checkpoint: Checkpoint) -> Iterator[Path]:
    weights = set(checkpoint.files.values())
    for path in sorted(checkpoint.folder.iterdir()):
        if path.is_file() and (path.name in weights or not any(path.match(p) for p in OTHER_FORMATS)):
            yield path
    if (templates := checkpoint.folder / CHAT_TEMPLATE_DIR).is_dir():
        yield from sorted(path for path in templates.iterdir() if path.is_file())


def _plan(checkpoint: Checkpoint, tensors: dict[str, AdapterTensor]) -> dict[str, list[_Patch]]:
    """Every file of weights -> what changes in it, in file order. Raises InputError for what the base lacks."""
    patches: dict[tuple[str, int], _Patch] = {}  # by file and where it begins
    for name, tensor in tensors.items():
        for link, shape in tensor.in_files(checkpoint.as_in_memory):
            if not (own_names := checkpoint.names_of(link.parameter)):
                raise InputError(f"{checkpoint.folder}: holds no tensor {link.parameter}, which the adapter changes")
            for own in own_names:
                file, info = checkpoint.files[own], checkpoint.info(own)
                count = 1 if link.expert is None else info.shape[0]
                size = (info.end - info.start) // count
                start = info.start + size * (link.expert or 0)
                patch = _Patch(file, own, info, start, start + size, shape, [])
                patches.setdefault((file, start), patch).changes.append((name, link))
    ordered = [patches[key] for key in sorted(patches)]
    return {file: [p for p in ordered if p.file == file] for file in sorted(set(checkpoint.files.values()))}


def _validate(plan: dict[str, list[_Patch]], checkpoint: Checkpoint) -> None:
    """Raise InputError unless the base's tensors have the model's shapes, and dtypes that can be merged into."""
    for patch in (patch for patches in plan.values() for patch in patches):
        where, info = f"{checkpoint.folder / patch.file}: tensor {patch.name}", patch.info
        sliced = any(link.expert is not None for _, link in patch.changes)
        if info.shape != ((info.shape[:1] if sliced else ()) + patch.shape):
            raise InputError(f"{where} has shape {info.shape}, which is not the model's")
        if info.dtype not in DTYPES:
            raise InputError(f"{where} is {info.dtype}; only {', '.join(DTYPES)} can be merged into")


def _apply(path: Path, patches: list[_Patch], tuned: AdapterWeights) -> bool:
    """Write the tuned bytes. Returns whether any is another one than before."""
    changed = False
    with open(path, "r+b") as handle:
        for patch in patches:
            handle.seek(patch.start)
            before = handle.read(patch.end - patch.start)
            content = patch.content(before, tuned)
            changed |= content != before
            handle.seek(patch.start)
            handle.write(content)
    return changed


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

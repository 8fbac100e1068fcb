"""What was encoded before, kept by what decides on it: the source's content, the tokenizer and the settings."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path

import numpy as np
import xxhash
from huggingface_hub import cached_assets_path
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as serialized

from esft.data.encoding import Encoder, check, encode_all
from esft.data.examples import Examples
from esft.data.sources import DataSource, read_records
from esft.errors import DiskError, InputError
from esft.storage.files import value_digest, whole_file
from esft.storage.reading import check_regular

FORMAT_VERSION = 1  # part of every key: what other versions have kept is not found
KEPT = 64  # files; those that were not used for the longest time go first
_TENSORS = {"ids": np.int32, "counted": np.bool_, "ends": np.int64}


def encoded(source: DataSource, encoder: Encoder, processes: int | None = None, progress: bool = False) -> Examples:
    """A source's examples, from the cache where they were encoded before.

    Raises InputError as ``read_records`` and ``encode_all`` do.
    """
    digest, kept = encoder.digest(), folder()
    if digest is None or kept is None:
        return encode_all(encoder, read_records(source), source.name, processes, progress)
    name = value_digest([FORMAT_VERSION, source.digest(), digest])
    path = kept / f"{name}.safetensors"
    if (found := load(path)) is not None:
        return check(found, source.name, encoder.max_length)
    examples = encode_all(encoder, read_records(source), source.name, processes, progress)
    with suppress(DiskError):  # a cache that cannot be kept only costs time
        save(path, examples)
    return examples


def folder() -> Path | None:
    """In the cache of ``huggingface_hub``, under HF_ASSETS_CACHE or HF_HOME; None where it cannot be made."""
    try:
        return cached_assets_path("esft", namespace="encoded", subfolder="examples")
    except (OSError, ValueError):  # the second for a file in the place of one of its folders
        return None


def save(path: Path, examples: Examples) -> None:
    """Raises DiskError."""
    arrays = {name: getattr(examples, name) for name in _TENSORS}
    counts = {"records": examples.records, "truncated": examples.truncated}
    about = {"digest": _digest(arrays, counts), **{name: str(count) for name, count in counts.items()}}
    with whole_file(path) as file:
        file.write(serialized(arrays, about))
    files = sorted(path.parent.glob("*.safetensors"), key=_used)
    for old in files[:-KEPT]:
        with suppress(OSError):
            old.unlink()


def load(path: Path) -> Examples | None:
    """What ``save`` has written there; None for anything else, and where there is nothing."""
    try:
        check_regular(path)
        with safe_open(path, framework="np") as handle:
            about = handle.metadata() or {}
            arrays = {name: handle.get_tensor(name) for name in _TENSORS}
        counts = {name: int(about[name]) for name in ("records", "truncated")}
        if about["digest"] != _digest(arrays, counts):
            return None
        os.utime(path)
    except (InputError, OSError, SafetensorError, KeyError, ValueError):
        return None
    return Examples(**arrays, **counts)


def _digest(arrays: dict[str, np.ndarray], counts: dict[str, int]) -> str:
    """Against files that were damaged; who can write to the cache is trusted."""
    digest = xxhash.xxh3_128(json.dumps(counts).encode())
    for name, dtype in _TENSORS.items():
        if arrays[name].dtype != dtype or arrays[name].ndim != 1:
            raise ValueError(name)
        digest.update(f"{name} {len(arrays[name])}".encode())
        digest.update(np.ascontiguousarray(arrays[name]))
    return digest.hexdigest()


def _used(path: Path) -> float:
    """When a file was used last; long ago where it is gone already."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0

"""Writing files: whole or not at all, and errors that name the file; and what a safetensors file holds."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from esft.errors import DiskError, ESFTError, InputError
from esft.reading import check_regular


def write_json(path: str | Path, value: Any) -> None:
    """Write through a temporary name and a rename. Raises DiskError when the file cannot be written."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise DiskError(f"{path}: {error.strerror or error}") from error


def check_new_file(path: str | Path, overwrite: bool = False) -> None:
    """Raise InputError unless a file can be written there: before the work whose result it is to hold."""
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path}: is a folder")
    if os.path.lexists(path) and not path.is_file():  # a device, or a link that leads nowhere
        raise InputError(f"{path}: is no regular file, and is not replaced")
    if not path.parent.is_dir():
        raise InputError(f"{path}: {path.parent} is not a folder")
    if path.exists() and not overwrite:
        raise InputError(f"{path}: exists already (say overwrite to replace it)")
    _check_parent(path)


def check_new_folder(path: str | Path, overwrite: bool = False) -> None:
    """Raise InputError unless a folder can be written there."""
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise InputError(f"{path}: is a file, not a folder")
    if path.exists() and any(path.iterdir()) and not overwrite:
        raise InputError(f"{path}: holds something already (say overwrite to replace it)")
    _check_parent(path)


def check_earlier(path: str | Path, kind: str, *marks: str) -> None:
    """Raise InputError for a folder that holds something but none of the files that mark an earlier one of a kind."""
    path = Path(path)
    if path.is_dir() and any(path.iterdir()) and not any((path / mark).is_file() for mark in marks):
        raise InputError(f"{path}: holds no earlier {kind} (no {marks[0]}), and is not overwritten")


def check_apart(out: str | Path, *inputs: str | Path) -> None:
    """Raise InputError when the output is one of the inputs, or a folder above one, which replacing it would delete."""
    out = Path(out).resolve()
    for path in inputs:
        resolved = Path(path).resolve()
        if out == resolved or out in resolved.parents:
            raise InputError(f"{out}: the output would replace {path}, which is read")


def _check_parent(path: Path) -> None:
    """Raise InputError unless the nearest folder above that exists is one, and can be written to."""
    parent = next(p for p in path.resolve().parents if p.exists())
    if not parent.is_dir():
        raise InputError(f"{path}: {parent} is not a folder")
    if not os.access(parent, os.W_OK):
        raise InputError(f"{path}: {parent} cannot be written to")


@contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """``safe_open`` for PyTorch tensors. Raises InputError when the file is missing, truncated or something else."""
    check_regular(path)
    try:
        handle = safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({error})") from error
    with handle:
        yield handle


@dataclass(frozen=True)
class TensorInfo:
    """A tensor in a safetensors file: its dtype by the format's name, its shape, and the bytes of the file it is in."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def safetensors_header(path: Path) -> dict[str, TensorInfo]:
    """Where the tensors of a safetensors file lie (format: 8 bytes of header length, a JSON header, the data)."""
    with open_safetensors(path):  # which checks the header against the file
        pass
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    begin = 8 + length
    return {
        name: TensorInfo(t["dtype"], tuple(t["shape"]), *(begin + offset for offset in t["data_offsets"]))
        for name, t in header.items()
        if name != "__metadata__"
    }


@contextmanager
def new_folder(path: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """A folder that appears under its name only when the block has ended without an error.

    Raises InputError when ``path`` exists and holds anything, unless ``overwrite``, and when it is or holds the working
    folder; DiskError when the disk is full or fails in the block. The old folder stays until the new one is whole. Of a
    link to a folder, that folder is replaced.
    """
    check_new_folder(path, overwrite)
    path, working = Path(path).resolve(), Path.cwd()
    if path == working or path in working.parents:
        raise InputError(f"{path}: the working folder cannot be replaced; name one below it or go elsewhere")
    temporary, old = path.with_name(f".{path.name}.tmp"), path.with_name(f".{path.name}.old")
    try:
        with _disk_errors(path, temporary):
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            yield temporary
            shutil.rmtree(old, ignore_errors=True)
            if path.exists():
                os.replace(path, old)
            try:
                os.replace(temporary, path)
            except OSError:
                if old.exists():
                    os.replace(old, path)
                raise
            shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _disk_errors(path: Path, temporary: Path) -> Iterator[None]:
    """What the system says while a folder is written, in one line that names the folder or the file at fault."""
    try:
        yield
    except ESFTError as error:  # of a file in the folder, which is gone when this is read
        if str(temporary) not in str(error):
            raise
        raise type(error)(str(error).replace(str(temporary), str(path))) from error
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a copy's error then names its source
        raise DiskError(f"{path if full else error.filename or path}: {error.strerror or error}") from error
    except SafetensorError as error:
        raise DiskError(f"{path}: {error}") from error

"""Reading and writing small files: whole or not at all, and errors that name the file."""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from esft.errors import DiskError, InputError

TEMPORARY = re.compile(r"\.esft-[0-9a-f]{8}\.tmp")  # what ``write_text`` calls a file that is not whole yet


def read_text(path: str | Path, encoding: str = "utf-8") -> str:
    """The file's text. Raises InputError when it cannot be read."""
    try:
        return Path(path).read_text(encoding=encoding)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text") from error


def read_json(path: str | Path) -> Any:
    """The file's JSON value. Raises InputError when it cannot be read, is not JSON, or has a key twice."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(found := dict(pairs)) < len(pairs):
            twice = next(key for key in found if sum(key == other for other, _ in pairs) > 1)
            raise InputError(f"{path}: has the key {twice!r} twice")
        return found

    try:
        return json.loads(read_text(path), object_pairs_hook=once)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: line {error.lineno}: not JSON ({error.msg})") from error


def write_text(path: str | Path, text: str) -> None:
    """Write through a temporary name and a rename: the file is the old one or the new one, whole.

    Of a link to a file, that file is replaced. Raises DiskError when the file cannot be written.
    """
    path = Path(path)
    try:
        target = path.resolve()
        temporary = temporary_beside(target)
        try:
            with open(temporary, "x", encoding="utf-8") as file:
                file.write(text)
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except (OSError, RuntimeError) as error:  # the second of a loop of links
        raise DiskError(f"{path}: {getattr(error, 'strerror', None) or error}") from error


def temporary_beside(path: Path) -> Path:
    """A name in the same folder that no user's file has, and by which a crash's remains are known (``TEMPORARY``)."""
    return path.with_name(f".esft-{secrets.token_hex(4)}.tmp")


def write_json(path: str | Path, value: Any) -> None:
    """``write_text`` of a value. Raises InputError for numbers that JSON does not have."""
    try:
        text = json.dumps(value, indent=1, allow_nan=False)
    except ValueError as error:
        raise InputError(f"{path}: cannot hold a value that is not finite") from error
    write_text(path, text + "\n")


@contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """``safe_open`` for PyTorch tensors. Raises InputError when the file is missing, truncated or something else."""
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

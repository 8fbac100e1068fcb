"""Writing files: whole or not at all, and errors that name the file; and what a safetensors file holds."""

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

import yaml
from safetensors import SafetensorError, safe_open

from esft.errors import DiskError, InputError
from esft.storage.reading import check_regular

TEMPORARY = re.compile(r"\.esft-[0-9a-f]{8}\.tmp")  # what ``write_text`` calls a file that is not whole yet


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


def write_yaml(path: str | Path, settings: dict[str, Any]) -> None:
    """``write_text`` of settings, in their order."""
    write_text(path, yaml.safe_dump(settings, sort_keys=False))


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

"""Writing files: whole or not at all, and errors that name the file; and what a safetensors file holds."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

try:
    import fcntl
except ModuleNotFoundError:  # not on Windows: there, what a dead writer has left stays
    fcntl = None

import yaml
from safetensors import SafetensorError, safe_open

from esft.errors import DiskError, InputError
from esft.storage.reading import check_regular

TEMPORARY = re.compile(r"\.esft-[0-9a-f]{8}(-[0-9a-f]{8})?\.tmp")  # what a file is called that is not whole yet
FLOATS = ("F64", "F32", "F16", "BF16")  # a safetensors file's names of the dtypes that are computed in


def write_text(path: str | Path, text: str) -> None:
    """``whole_file`` with this text in UTF-8."""
    with whole_file(path) as file:
        file.write(text.encode())


@contextmanager
def whole_file(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write, which has its name when the block has ended without an error and its bytes are on the disk.

    Until then it has a temporary name in the same folder: the named file is the old one or the new one, whole, after a
    power cut too. Of a link to a file, that file is replaced. What writers of this file have left that were killed is
    cleared away. Raises DiskError when the file cannot be written, and where there is a device or a pipe.
    """
    path = Path(path)
    try:
        target = path.resolve()
        if target.exists() and not target.is_file():
            raise DiskError(f"{path}: is no regular file, and is not replaced")
        _clear(target)
        temporary, file = _begin(target)
        try:
            with file:
                yield file
                file.flush()
                os.fsync(file.fileno())
                if fcntl is None:
                    file.close()  # Windows renames nothing that is open
                os.replace(temporary, target)  # while it is held: nobody takes it for a dead writer's
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except DiskError:
        raise
    except (OSError, RuntimeError) as error:  # the second of a loop of links
        raise DiskError(f"{path}: {getattr(error, 'strerror', None) or error}") from error


def _begin(target: Path) -> tuple[Path, BinaryIO]:
    """A temporary file for this one, held by this process until it is closed."""
    while True:
        temporary = target.with_name(f"{_prefix(target)}{secrets.token_hex(4)}.tmp")
        file = open(temporary, "xb")  # noqa: SIM115 (closed by who writes it)
        # Another writer may have found it in the moment before it was held.
        if _hold(file) is not False and temporary.exists():
            return temporary, file
        file.close()


def _prefix(target: Path) -> str:
    """How the temporary names of this file begin; its own name may be as long as names can be."""
    return f".esft-{hashlib.sha256(os.fsencode(target.name)).hexdigest()[:8]}-"


def _clear(target: Path) -> None:
    """Remove what writers of this file have left that live no more: the system lets go of what a process held."""
    for left in target.parent.glob(f"{_prefix(target)}*.tmp"):
        if TEMPORARY.fullmatch(left.name) and left.is_file() and not left.is_symlink():
            with suppress(OSError), open(left, "rb") as file:
                if _hold(file):
                    left.unlink()


def _hold(file: BinaryIO) -> bool | None:
    """Hold a file against every other opening of it. False where another one does, None where the system cannot."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return None
    return True


def file_digest(path: Path) -> str:
    """SHA-256 of its bytes, in hex. Raises InputError for a file that cannot be read."""
    check_regular(path)
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error
    return digest.hexdigest()


def value_digest(value: Any) -> str:
    """SHA-256 of a JSON value in hex, whatever the order of its keys; what JSON does not have counts as its text."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


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

"""The errors that a user meets; each says in one line what is wrong and with which file, argument or value."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LONGEST = 400  # characters of another library's words in a message


class ESFTError(Exception):
    """Any of them; the command prints it and exits with 2."""


class InputError(ESFTError, ValueError):
    """Bad input, which names the file, line, argument or value."""


class DiskError(ESFTError, OSError):
    """A disk that is full, or that fails; names the file or folder. Nothing half-written is left."""


class OutOfMemory(ESFTError, MemoryError):
    """A model that the memory has no room for; names it, what is missing, and what would say how to make it fit."""


class DivergenceError(ESFTError, ArithmeticError):
    """A training whose loss or gradient is no longer a number; names the step."""


class RankError(ESFTError):
    """A job of several processes in which one has failed, or they do not agree; names the rank."""


class Interrupted(KeyboardInterrupt):
    """A signal has stopped the work.

    Attributes:
        signal: its number.
        resumable: whether a training has saved a checkpoint for it.
    """

    def __init__(self, message: str, signal: int, resumable: bool = False):
        super().__init__(message)
        self.signal, self.resumable = signal, resumable


def check_is_error(error: BaseException) -> None:
    """Raise again what only ends the process. A panic of a library's compiled code is an error, if no ``Exception``."""
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        raise error


def first_line(error: BaseException) -> str:
    """What an error of another library says, for a message in one line; cut where it is long."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    # A line that ends so only says that the next one tells.
    line = " ".join(each.strip() for each in (lines[:2] if lines[0].endswith(":") else lines[:1]))
    if isinstance(error, KeyError) and error.args:  # says nothing but the key
        line = f"{type(error).__name__} {line}"
    return line if len(line) <= LONGEST else line[:LONGEST] + "..."


_ASKED = re.compile(r"tried to allocate ([\d.]+) (bytes|[KMG]iB)", re.IGNORECASE)  # both allocators say it so
_UNITS = {"bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


def asked_for(error: Exception) -> int | None:
    """The bytes that an allocator was asked for in vain; None for an error of another kind."""
    found = _ASKED.search(str(error))
    return round(float(found[1]) * _UNITS[found[2]]) if found else None


_NOTE = "while reading "


@contextmanager
def reading(what: str | Path) -> Iterator[None]:
    """Note on an error that is none of ours what was being read; a command's last line then names it."""
    try:
        yield
    except ESFTError:
        raise
    except BaseException as error:
        check_is_error(error)
        # As ``add_note`` does, which Python 3.10 does not have.
        error.__dict__.setdefault("__notes__", []).append(f"{_NOTE}{what}")
        raise


def what_was_read(error: BaseException) -> str | None:
    """What ``reading`` has noted, the innermost; None where nothing was."""
    notes = (str(note) for note in vars(error).get("__notes__", ()))
    return next((note.removeprefix(_NOTE) for note in notes if note.startswith(_NOTE)), None)

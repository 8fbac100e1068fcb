"""Where the program writes: it replaces nothing but what it wrote itself, and that when the successor is whole."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from esft.errors import DiskError, ESFTError, InputError, first_line
from esft.storage.locks import locked
from esft.storage.reading import check_name

# What a folder of weights or of a run is known by: any other file in it may be a part of it.
_WEIGHTS, RUN_MARKER = "*.safetensors", "esft_run.json"
_LOCK, _NEW, _OLD = "lock", "new", "old"  # what is beside a folder while it is written


def resolved(path: str | Path) -> Path:
    """The path without links. Raises InputError for links that go in a circle, and for what is no path."""
    check_name(path)
    try:
        return Path(path).resolve()
    except (OSError, RuntimeError) as error:
        raise InputError(f"{path}: links that lead nowhere") from error


def check_apart(out: str | Path, *inputs: str | Path | None) -> None:
    """Raise InputError when an output is one of the inputs, under whatever name, or a folder above one.

    An output that is a file may not lie in an input folder either, nor in the place of one: in a checkpoint's or an
    adapter's folder any file can mean something. Inputs that are None are passed over.
    """
    place = resolved(out)
    for path in (path for path in inputs if path is not None):
        source = resolved(path)
        # Of what lies in a folder that is closed to the user, nothing is known but its name.
        same = place == source or (os.path.exists(place) and os.path.exists(source) and place.samefile(source))
        if same or place in source.parents:
            raise InputError(f"{place}: the output would replace {path}, which is read")


def check_outside(out: str | Path, *folders: str | Path | None) -> None:
    """Raise InputError when an output lies in one of these folders, of which any file may be read.

    Files among them, and None, are passed over.
    """
    place = resolved(out)
    for folder in folders:
        if folder is not None and (inside := resolved(folder)).is_dir() and inside in place.parents:
            raise InputError(f"{out}: lies in {folder}, which is read")


def check_new_file(
    path: str | Path, overwrite: Callable[[Path], Any] | None = None, inputs: Collection[str | Path | None] = ()
) -> None:
    """Raise InputError unless a file can be written there: before the work whose result it is to hold.

    Args:
        overwrite: reads a file of the kind that is written, and raises InputError for another: only one of that kind,
            or an empty file, is replaced, and none in a folder of weights or of a run. None where nothing is.
        inputs: files and folders that are read; see ``check_apart``. The file may not lie in one of the folders.
    """
    place = resolved(path)
    if os.path.isdir(place):
        raise InputError(f"{path}: is a folder")
    if os.path.basename(path) in ("", "."):  # pathlib takes the end of such a name away
        raise InputError(f"{path}: names a folder, and a file is written")
    path = Path(path)
    if not os.path.isdir(place.parent):
        raise InputError(f"{path}: {path.parent} is not a folder")
    check_apart(path, *inputs)
    check_outside(path, *inputs)
    if os.path.exists(place):
        if overwrite is None:
            raise InputError(f"{path}: exists already (`overwrite=True` replaces it)")
        if not place.is_file():
            raise InputError(f"{path}: is no ordinary file, and is not overwritten")
        if place.stat().st_size:
            try:
                overwrite(place)
            except OSError as error:
                raise InputError(f"{path}: {error.strerror or error}") from error
            except InputError as error:
                raise InputError(f"{path}: holds something else, and is not overwritten ({error})") from error
        if part := next((each.name for kind in (_WEIGHTS, RUN_MARKER) for each in place.parent.glob(kind)), None):
            raise InputError(f"{path}: lies beside {part}, may be a part of the same, and is not overwritten")
    _check_parent(path)


# Reads what an earlier output in a folder consists of, as paths below it; raises InputError where there is none.
Earlier = Callable[[Path], Collection[str]]


def check_new_folder(path: str | Path, earlier: Earlier | None = None) -> None:
    """Raise InputError unless a folder can be written there, DiskError where it cannot be looked at.

    Args:
        earlier: tells an earlier output's files; a folder that holds nothing else may be replaced. None where only an
            empty folder may.
    """
    place = resolved(path)
    with disk_errors(place):  # of files that go while they are looked at, too
        if place.exists() and not place.is_dir():
            raise InputError(f"{path}: is a file, not a folder")
        if place.exists() and any(place.iterdir()):
            if earlier is None:
                raise InputError(f"{path}: holds something already (`overwrite=True` replaces it)")
            check_all_ours(place, earlier(place))
        _check_parent(Path(path))


def check_all_ours(folder: Path, ours: Collection[str]) -> None:
    """Raise InputError naming what a folder holds beside these files."""
    if foreign := next((entry for entry in entries(folder) if entry not in ours), None):
        raise InputError(f"{folder}: holds {foreign}, which is no part of what is overwritten; move it elsewhere first")


def entries(folder: Path) -> Iterator[str]:
    """Paths below a folder, in order: files, links (which are not followed) and folders that hold nothing."""
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.is_symlink() and any(path.iterdir()):
            yield from (f"{path.name}/{below}" for below in entries(path))
        else:
            yield path.name


def _check_parent(path: Path) -> None:
    """Raise InputError unless the nearest folder above that exists is one, can be written to, and the name is text."""
    try:
        str(path).encode()
    except UnicodeEncodeError as error:  # libraries that write there take text only
        raise InputError(f"{path}: is no name in UTF-8") from error
    if str(path).startswith("~"):
        raise InputError(f"{path}: begins with ~, which no shell has replaced; write the folder's name")
    parent = next(p for p in resolved(path).parents if os.path.exists(p))
    if not parent.is_dir():
        raise InputError(f"{path}: {parent} is not a folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"{path}: {parent} cannot be written to")


@contextmanager
def new_folder(path: str | Path, earlier: Earlier | None = None) -> Iterator[Path]:
    """A folder that appears under its name only when the block has ended without an error.

    Until then it is ``.NAME.esft/new`` beside it, and what it replaces stays. There is also the lock: of two processes
    that write the same folder, the second is refused. What a crash leaves there is cleared away by the next that writes
    the folder; where the crash came between putting the old folder aside and the new one in its place, that is done.

    Raises InputError where ``check_new_folder`` does, when the folder is or holds the working folder, and when another
    process writes it; DiskError when the disk is full or fails in the block. Of a link to a folder, that folder is
    replaced.
    """
    check_new_folder(path, earlier)
    path, working = resolved(path), Path.cwd()
    if path == working or path in working.parents:
        raise InputError(f"{path}: the working folder cannot be replaced; name one below it or go elsewhere")
    beside = path.with_name(f".{path.name}.esft")
    new, old = beside / _NEW, beside / _OLD
    with _named(path, new), disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _check_beside(beside)
        beside.mkdir(exist_ok=True)
        try:
            with locked(beside / _LOCK, path):
                try:
                    _finish(path)
                    check_new_folder(path, earlier)
                    new.mkdir()
                    yield new
                    _to_disk(new)
                    check_new_folder(path, earlier)  # again, as the block may have taken hours
                    if path.exists():
                        os.replace(path, old)
                    try:
                        os.replace(new, path)
                    except OSError:
                        if old.exists():
                            os.replace(old, path)
                        raise
                    shutil.rmtree(old, ignore_errors=True)
                finally:
                    shutil.rmtree(new, ignore_errors=True)
        finally:
            with suppress(OSError):  # another process may be there by now
                beside.rmdir()


def _to_disk(folder: Path) -> None:
    """Wait until the files below a folder are on the disk: a name without its bytes is what a power cut leaves else."""
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            with open(path, "rb+") as file:
                os.fsync(file.fileno())


def recover(folder: Path, names: re.Pattern[str]) -> None:
    """Clear away what a crash has left of writing folders with such names in this one, which no process writes now."""
    for beside in folder.glob(".*.esft"):
        name = beside.name[1 : -len(".esft")]
        if names.fullmatch(name) and {path.name for path in beside.iterdir()} <= {_LOCK, _NEW, _OLD}:
            _finish(folder / name)
            (beside / _LOCK).unlink(missing_ok=True)
            beside.rmdir()


def _finish(path: Path) -> None:
    """Clear away what a crash has left of writing a folder."""
    new, old = (path.with_name(f".{path.name}.esft") / name for name in (_NEW, _OLD))
    empty = path.is_dir() and not any(path.iterdir())
    if old.exists() and (empty or not path.exists()):
        os.replace(new if new.exists() else old, path)  # the old one is put aside when the new one is whole
    for left in (new, old):
        shutil.rmtree(left, ignore_errors=True)


def _check_beside(beside: Path) -> None:
    """Raise InputError where something else has the name of the folder that holds what is not whole yet."""
    if beside.is_symlink() or beside.exists():
        held = {path.name for path in beside.iterdir()} if beside.is_dir() and not beside.is_symlink() else {"a file"}
        if any((beside / name).is_symlink() for name in held):  # no writer makes one
            held = {"a link"}
        if held and not {_LOCK} <= held <= {_LOCK, _NEW, _OLD}:  # a kill leaves the lock, or an empty folder
            raise InputError(f"{beside}: is in the way of what is written there until it is whole; move it elsewhere")


@contextmanager
def _named(path: Path, temporary: Path) -> Iterator[None]:
    """Errors about a folder that is not whole yet, and is gone when they are read, name the one that it was to be."""
    try:
        yield
    except ESFTError as error:
        if str(temporary) not in str(error):
            raise
        raise type(error)(str(error).replace(str(temporary), str(path))) from error


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """What the system says while a file or folder is written, as a DiskError that names it or the file at fault."""
    try:
        yield
    except (ESFTError, BrokenPipeError):  # the second of who reads what is printed, and has seen enough
        raise
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a copy's error then names its source
        said = error.strerror or first_line(error)
        raise DiskError(f"{path if full else error.filename or path}: {said}") from error
    except SafetensorError as error:
        raise DiskError(f"{path}: {error}") from error

"""Locks: one process at a time writes to a place, and another one is told which process that is."""

from __future__ import annotations

import json
import os
import shlex
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from filelock import FileLock, SoftFileLock, Timeout

from esft.errors import DiskError, InputError

LONGEST = 120  # characters of a command in a message


@contextmanager
def locked(lock: Path, place: Path) -> Iterator[None]:
    """Hold a lock for the block. The system lets go of it when the process ends, however that happens.

    Args:
        lock: the lock's file, in a folder that exists. It says who holds it, and goes at the end; one that a crash has
            left is taken over.
        place: what is locked, for the message.

    Raises InputError naming the holder when another process (or another thread of this one) has the lock, and for a
    file under the lock's name that is none; DiskError when the lock cannot be made.
    """
    _check_ours(lock)
    held = FileLock(lock, timeout=0, thread_local=False)
    try:
        held.acquire()
    except Timeout as error:
        raise InputError(f"{place}: in use by {_holder(lock)}") from error
    except OSError as error:
        raise DiskError(f"{lock}: {error.strerror or error}") from error
    try:
        if not isinstance(held, SoftFileLock):  # which a file system without flock gets, with content of its own
            with suppress(OSError):  # of a full disk, which then shows in what the lock is for
                lock.write_text(json.dumps({"esft_lock": _self()}) + "\n", encoding="utf-8")
        yield
    finally:
        # While it is held: filelock takes no lock whose file has lost its name, so nobody holds one that is not seen.
        lock.unlink(missing_ok=True)
        held.release()


def _self() -> str:
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    shown = command if len(command) <= LONGEST else command[:LONGEST] + "..."
    since = datetime.now().astimezone().isoformat(" ", "seconds")
    return f"process {os.getpid()} on {socket.gethostname()} since {since}: {shown}"


def _holder(lock: Path) -> str:
    try:
        return str(json.loads(lock.read_text(encoding="utf-8"))["esft_lock"]).encode("unicode_escape").decode()
    except (OSError, ValueError, KeyError, TypeError):  # it begins or ends at this very moment
        return "another process"


def _check_ours(lock: Path) -> None:
    """Raise InputError for a file of somebody else's under the lock's name."""
    if not (lock.exists() or lock.is_symlink()):
        return
    if lock.is_symlink() or not lock.is_file():
        raise InputError(f"{lock}: is no lock of this program, but has the name of one; move it elsewhere")
    try:
        content = lock.read_bytes()
    except FileNotFoundError:
        return
    # A kill can leave a torn one; one of a file system without flock is filelock's own.
    start = b'{"esft_lock"'
    if content and not (content.startswith(start) or start.startswith(content)) and not content[:1].isdigit():
        raise InputError(f"{lock}: is no lock of this program, but has the name of one; move it elsewhere")

"""What a program of somebody else's, such as a chat template, may take: time and memory."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from esft.errors import InputError

try:
    import resource
except ModuleNotFoundError:  # Windows
    resource = None

_USED = Path("/proc/self/statm")  # its sixth number: pages of data


class _Late(BaseException):
    """No ``Exception``, which the code that takes too long may catch."""


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raise InputError in a block of Python code that takes longer than this.

    Not in threads but the main one, and not on Windows: there a block takes as long as it takes.
    """

    def late(*_: object) -> NoReturn:
        raise _Late

    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return
    before, timer = signal.signal(signal.SIGALRM, late), signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except _Late:
        raise InputError(f"it takes longer than {seconds:g} seconds") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)  # a caller's own goes on
        signal.signal(signal.SIGALRM, before if before is not None else signal.SIG_DFL)


@contextmanager
def memory_within(more: int) -> Iterator[None]:
    """Let the process have so many bytes more in the block; beyond them Python raises MemoryError. On Linux only."""
    if resource is None or not _USED.is_file():
        yield
        return
    used = int(_USED.read_text().split()[5]) * os.sysconf("SC_PAGE_SIZE")
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    least = min(limit for limit in (used + more, soft, hard) if limit != resource.RLIM_INFINITY)
    with suppress(ValueError):  # of a limit that the process may not have
        resource.setrlimit(resource.RLIMIT_DATA, (least, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))

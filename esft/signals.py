"""Signals that end a training: the step at hand is finished first, and a second one does not wait for it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def stop_signals() -> Iterator[Callable[[], int | None]]:
    """In the block the first SIGINT or SIGTERM is only noted, and the second one ends the process at once.

    Yields a function that gives the number of the signal that came, None before one does. In threads but the main one,
    to which Python gives no signals, none ever comes.
    """
    came: list[int] = []

    def note(number: int, _) -> None:
        if came:
            os._exit(128 + number)
        came.append(number)

    def asked() -> int | None:
        return came[0] if came else None

    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)  # None: not set from Python

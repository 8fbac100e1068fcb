"""Other processes for tests: forked, as a fresh one would import for seconds."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any


def forked(block: Callable[[], Any]) -> int:
    """Run a block in a child process. Returns its id; the child's status is 0 at the end of the block, 1 on errors."""
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    status = 1
    try:
        block()
        status = 0
    finally:
        os._exit(status)


def status(pid: int) -> int:
    """Of a child, when it has ended: as a shell has it, negative after a signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

"""Other processes for tests: forked, as a fresh one would import for seconds."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import esft.cli.parser as command

STREAMS = ("stdin", "stdout", "stderr")


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


# What a shell writes for a standard stream: its number, and where it leads instead; nowhere where it is closed.
REDIRECTIONS = {
    "<&-": (0, None), ">&-": (1, None), "2>&-": (2, None),
    ">/dev/full": (1, "/dev/full"), "2>/dev/full": (2, "/dev/full"),
}  # fmt: skip


def started(arguments: list[str], folder: Path, redirected: str = "", given: str = "") -> int:
    """Start ``python -m esft`` in a folder, in a child process, which has imported all of it. Returns its id.

    Args:
        redirected: standard streams, as a shell has it.
        given: what standard input holds. What is printed goes to the files ``stdout`` and ``stderr`` of the folder.
    """

    def child() -> None:
        os.chdir(folder)
        Path("stdin").write_text(given, encoding="utf-8")
        for number, name in enumerate(STREAMS):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC * bool(number)), number)
        streams = [REDIRECTIONS[word] for word in redirected.split()]
        for number, instead in streams:
            if instead is not None:
                os.dup2(os.open(instead, os.O_RDWR), number)
        for number, instead in streams:  # last, or what is opened would get its number
            if instead is None:
                os.close(number)
        sys.argv = [str(Path(command.__file__).parents[1] / "__main__.py"), *arguments]
        os._exit(_run_as_python_does(command.entry))

    return forked(child)


def _run_as_python_does(program: Callable[[], None]) -> int:
    """Streams as at the start of Python, None for one that is closed; its status at the end."""
    for number, name in enumerate(STREAMS):
        try:
            os.fstat(number)
            stream = open(number, "w" if number else "r", 1 if number == 2 else -1, "utf-8", closefd=False)  # noqa: SIM115
        except OSError:
            stream = None
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    ended: Any = 0
    try:
        program()
    except SystemExit as end:
        ended = end.code
    except BaseException:  # as Python tells it
        traceback.print_exc()
        ended = 1
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            ended = 120
    return ended or 0

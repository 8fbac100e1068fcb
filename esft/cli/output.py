"""What goes to the terminal: lines of our own, in which nothing that a file or a name holds can move the cursor."""

from __future__ import annotations

import io
import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import wrapt

from esft.errors import DiskError, ESFTError, first_line, what_was_read
from esft.parallel.environment import own_name
from esft.text import printable

DEBUG = "ESFT_DEBUG"
# What messages call the arguments that are options here: they are made for callers from Python.
_ARGUMENT = re.compile(r"`(overwrite|resume|trust_remote_code)=True`|`(max_length)=(\d+)`")


def as_options(text: str) -> str:
    """A message with the options of the command line in the place of arguments from Python."""
    return _ARGUMENT.sub(lambda found: _option(*found.groups()), text)


def _option(flag: str | None, name: str | None, value: str | None) -> str:
    return f"--{flag.replace('_', '-')}" if flag else f"--{str(name).replace('_', '-')} {value}"


def put(text: str, flush: bool = False) -> None:
    """Text on standard output as it is. Raises DiskError where that cannot be written, BrokenPipeError as it comes."""
    try:
        sys.stdout.write(text)
        if flush:
            sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise DiskError(f"standard output: {error.strerror or error}") from error


def say(*lines: str) -> None:
    """Lines on standard output."""
    put("\n".join(map(printable, lines)) + "\n")


def say_part(text: str) -> None:
    """A part of a text on standard output, at once; line ends and tabs are its own."""
    put(printable(text, kept="\n\t"), flush=True)


def say_marked(parts: Iterable[tuple[str, bool]]) -> None:
    """A text on standard output, what is marked of it in colour; in brackets where no terminal shows colours."""
    coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    begin, end = ("\x1b[32m", "\x1b[0m") if coloured else ("[[", "]]")
    lines = []
    for text, marked in parts:
        shown = [printable(line) for line in text.split("\n")]
        lines.append("\n".join(f"{begin}{line}{end}" for line in shown) if marked else "\n".join(shown))
    put("".join(lines) + "\n")


def complain(text: str, by: str = "esft") -> None:
    """One line on standard error; one of several processes names itself."""
    print(f"{by}: {own_name()}{printable(text)}", file=sys.stderr)


def explain(error: BaseException) -> None:
    """An error in one line; with its traceback where ``ESFT_DEBUG`` is set.

    What is no error of ours came out of a library that read something for which it was not made, or is our mistake.
    """
    if os.environ.get(DEBUG):
        traceback.print_exception(error)
    if isinstance(error, ESFTError):
        return complain(as_options(str(error)))
    if isinstance(error, PermissionError) and error.filename is not None:  # which any look at a path may raise
        return complain(f"{error.filename}: {error.strerror}")
    kind, said = type(error).__name__, first_line(error)
    said = said if said.startswith(kind) else f"{kind}: {said}"
    if isinstance(error, OSError) and error.filename is not None:
        said = f"{error.filename}: {error.strerror}"
    what = what_was_read(error)
    complain(f"{what}: cannot be used ({said})" if what else f"{said} ({DEBUG}=1 shows where)")


class _Heard(io.TextIOWrapper):
    """Standard error of which what cannot be written is let go: the work does not end for a bar or a warning."""

    def write(self, text: str, /) -> int:
        with suppress(OSError):
            return super().write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            super().flush()


def open_streams() -> None:
    """Make standard streams ready for whatever a command is started with.

    Those that are closed get the null device: else the next file that is opened has a stream's number, and gets what is
    printed.
    """
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(number)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 (until the process ends)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal without these characters
    if isinstance(theirs := sys.stderr, io.TextIOWrapper) and theirs is sys.__stderr__:
        sys.stderr = _Heard(theirs.buffer, theirs.encoding, theirs.errors, line_buffering=True, write_through=True)


def hush_libraries() -> None:
    """No bars and no warnings of other libraries."""

    @wrapt.when_imported("transformers.utils.logging")
    def hush(theirs: Any) -> None:
        theirs.set_verbosity_error()
        theirs.disable_progress_bar()

    @wrapt.when_imported("datasets.utils.tqdm")
    def hide_bars(theirs: Any) -> None:
        theirs.disable_progress_bars()

    logging.getLogger().setLevel(logging.ERROR)  # of all that set no level of their own
    logging.getLogger("esft").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore")
    warnings.filterwarnings("default", module=r"esft\.")


def listen() -> None:
    """Show our own warnings as lines like the errors."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Lines())
    logging.getLogger("esft").addHandler(handler)
    logging.getLogger("esft").setLevel(logging.INFO)
    logging.getLogger("esft").propagate = False
    theirs = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], filename: str, *more: object) -> None:
        if f"{os.sep}esft{os.sep}" in filename:
            complain(f"warning: {message}")
        else:
            theirs(message, category, filename, *more)  # type: ignore[arg-type]

    warnings.showwarning = show  # type: ignore[assignment]


class _Lines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(f"esft: {record.levelname.lower()}: {record.getMessage()}")

"""The figures of a run, a line a step: written as it goes, and read back."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from esft.errors import InputError
from esft.storage.files import write_text
from esft.storage.outputs import disk_errors
from esft.storage.reading import parse_json, read_text, shown

LARGEST = 1e300  # of a figure, so that sums of some stay numbers


@contextmanager
def logging(path: Path, board: Path, done: int) -> Iterator[Callable[..., None]]:
    """A function ``log(step, **values)`` that adds a line to a file and points to TensorBoard's events.

    Args:
        path: the file.
        board: the folder of the events.
        done: steps that the run has done; both forget what they have of later ones.
    """
    lines = [line for line in read_metrics(path, torn=True) if line["step"] <= done] if path.is_file() else []
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))
    with open(path, "a", encoding="utf-8") as file, _events(board, done) as add:

        def log(step: int, **values: float) -> None:
            with disk_errors(path):
                print(json.dumps({"step": step, **values}), file=file, flush=True)
            for name, value in values.items():
                add(name, value, step)

        yield log


@contextmanager
def _events(board: Path, done: int) -> Iterator[Callable[[str, float, int], None]]:
    """A function that adds a value to TensorBoard's events.

    They are written by a thread, which meets a full disk first: what it is told is raised at the next call, and need
    not be printed with a traceback, too.
    """
    print_traceback = threading.excepthook
    threading.excepthook = lambda of: None if isinstance(of.exc_value, OSError) else print_traceback(of)
    try:
        with disk_errors(board):
            events = SummaryWriter(str(board), purge_step=done + 1)

        def add(name: str, value: float, step: int) -> None:
            with disk_errors(board):
                events.add_scalar(name, value, step)

        try:
            yield add
        finally:
            with disk_errors(board):
                events.close()
    finally:
        threading.excepthook = print_traceback


def read_metrics(path: Path, torn: bool = False) -> list[dict[str, Any]]:
    """The lines of a run's figures, in the order of their steps.

    Args:
        torn: leave out a last line that a kill has cut short.

    Raises InputError naming file and line.
    """
    text, lines = read_text(path), []
    for number, line in enumerate(text.splitlines(), 1):
        where = f"{path}: line {number}"
        try:
            values = parse_json(line, where, lines=False)
        except InputError:
            if torn and not text.endswith("\n") and number == len(text.splitlines()):
                break
            raise
        _check(values, where)
        if lines and values["step"] < lines[-1]["step"]:
            raise InputError(f"{where}: step {values['step']} comes after step {lines[-1]['step']}")
        lines.append(values)
    return lines


def _check(values: Any, where: str) -> None:
    """Raise InputError for a line that is no step's figures."""
    if not isinstance(values, dict) or type(values.get("step")) is not int or values["step"] < 1:
        raise InputError(f"{where}: names no step")
    for name, value in values.items():
        if type(value) not in (int, float) or not abs(value) <= LARGEST:
            raise InputError(f"{where}: {name} is {shown(value)}, no number")
    if "loss" in values and not {"lr", "tokens_per_second"} <= values.keys():
        raise InputError(f"{where}: a loss without lr and tokens_per_second")

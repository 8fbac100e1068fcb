"""The figures of a run, a line a step: written as it goes, and read back."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from esft.errors import InputError
from esft.runs.reporting import Report
from esft.storage.files import write_text
from esft.storage.limits import METRICS_BYTES
from esft.storage.outputs import disk_errors
from esft.storage.reading import parse_json, read_text, shown

EVALUATED = "eval_"  # what the names of an evaluation's figures begin with
LARGEST = 1e300  # of a figure, so that sums of some stay numbers


@contextmanager
def logging(path: Path, done: int, report: Report) -> Iterator[Callable[..., None]]:
    """A function ``log(step, **values)`` that adds a line to a file and has it shown elsewhere.

    Args:
        path: the file.
        done: steps that the run has done; what the file has of later ones goes.
        report: shows the figures of a step.
    """
    lines = [line for line in read_metrics(path, torn=True) if line["step"] <= done] if path.is_file() else []
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))
    with open(path, "a", encoding="utf-8") as file:

        def log(step: int, **values: float) -> None:
            with disk_errors(path):
                print(json.dumps({"step": step, **values}), file=file, flush=True)
            report(step, values)

        yield log


def read_metrics(path: Path, torn: bool = False) -> list[dict[str, Any]]:
    """The lines of a run's figures, in the order of their steps.

    Args:
        torn: leave out a last line that a kill has cut short.

    Raises InputError naming file and line.
    """
    text, lines = read_text(path, most=METRICS_BYTES), []
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


def evaluations(lines: Sequence[Mapping[str, Any]]) -> dict[int, dict[str, Any]]:
    """The figures of evaluation data, by the step that they come after: the last of each, 0 being before the first."""
    found: dict[int, dict[str, Any]] = {}
    for line in lines:
        if figures := {name: value for name, value in line.items() if name.startswith(EVALUATED)}:
            found[line["step"]] = found.get(line["step"], {}) | figures
    return found


def _check(values: Any, where: str) -> None:
    """Raise InputError for a line that is no step's figures."""
    step = values.get("step") if isinstance(values, dict) else None
    before = step == 0 and any(name.startswith(EVALUATED) for name in values)  # the first step
    if type(step) is not int or (step < 1 and not before):
        raise InputError(f"{where}: names no step")
    for name, value in values.items():
        if type(value) not in (int, float) or not abs(value) <= LARGEST:
            raise InputError(f"{where}: {name} is {shown(value)}, no number")
    if "loss" in values and not {"lr", "tokens_per_second"} <= values.keys():
        raise InputError(f"{where}: a loss without lr and tokens_per_second")

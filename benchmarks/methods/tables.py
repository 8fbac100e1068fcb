"""The tables of the comparison, from its figures: means over tasks and seeds, standard errors, paired differences."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

from scipy import stats

from benchmarks.methods.cell import METHODS
from esft.runs.report import table

CONFIDENCE = 0.95
Rows = list[dict[str, Any]]


def page(cells: Rows) -> str:
    """All tables, as Markdown. ``cells`` are of ``cell.measure``."""
    final = [cell for cell in cells if cell["split"] == "test"]
    best = "esft-token, shared"
    parts = [
        "## Learning rates tried on the validation split, exact match in percent", trials(cells),
        "## Task score, exact match in percent", by_task(final, lambda cell: 100 * cell["score"]),
        "## Rise of the general loss, nats a token", rises(final),
        "## What it takes", costs(final),
        f"## Differences to {best}, same task and seed", differences(final, best),
    ]  # fmt: skip
    return "\n\n".join(parts)


def trials(cells: Rows) -> str:
    """A row a method, a column a task: every rate that was tried, and the score with it."""
    tried = [cell for cell in cells if cell["split"] == "validation"]
    tasks = sorted({cell["task"] for cell in tried})
    rows: list[dict[str, Any]] = [
        {"method": method}
        | {
            task: ", ".join(
                f"{cell['rate']:g}: {100 * cell['score']:.1f}"
                for cell in sorted(tried, key=lambda cell: cell["rate"])
                if (cell["method"], cell["task"]) == (method, task)
            )
            for task in tasks
        }
        for method in _methods(tried)
    ]
    return table(rows) if rows else "None were tried."


def by_task(cells: Rows, value) -> str:
    """A row a method, a column a task: mean and standard error over seeds; at the end over tasks as well."""
    tasks, rows = sorted({cell["task"] for cell in cells}), []
    if not cells:
        return "Nothing was tested."
    for method in _methods(cells):
        row: dict[str, Any] = {"method": method}
        for task in tasks:
            row[task] = spread([value(c) for c in cells if c["method"] == method and c["task"] == task])
        seeds = sorted({c["seed"] for c in cells if c["method"] == method})
        of_seed = [[value(c) for c in cells if c["method"] == method and c["seed"] == seed] for seed in seeds]
        whole = [statistics.mean(values) for values in of_seed if len(values) == len(tasks)]
        rows.append(row | {"mean": spread(whole)})
    return table(rows)


def rises(cells: Rows) -> str:
    """A row a method, a column a part of the general data: by how much its loss is above the base's."""
    base = {(c["task"], part): loss for c in cells if c["method"] == "base" for part, loss in c["general"].items()}
    parts = sorted({part for _, part in base})
    return table(
        [
            {"method": method}
            | {
                part: spread([c["general"][part] - base[c["task"], part] for c in cells if c["method"] == method])
                for part in parts
            }
            for method in _methods(cells)
            if method != "base"
        ]
    ) if base else "No figures of the base."  # fmt: skip


def costs(cells: Rows) -> str:
    """Means over all cells of a method."""
    rows = []
    for method in _methods(cells):
        own = [cell for cell in cells if cell["method"] == method and "seconds" in cell]
        if own:
            mean = {
                name: statistics.mean(c[name] for c in own) for name in own[0] if isinstance(own[0][name], int | float)
            }
            rows.append(
                {
                    "method": method,
                    "trained": f"{mean['trained_parameters']:,.0f}",
                    "share": f"{mean['trained_parameters'] / mean['parameters']:.1%}",
                    "stored MB": f"{mean['stored_bytes'] / 1e6:.1f}",
                    "seconds": f"{mean['seconds']:.0f}",
                    "peak MB": f"{mean['peak_memory'] / 1e6:.0f}",
                }
            )
    return table(rows) if rows else "Nothing was trained."


def differences(cells: Rows, best: str) -> str:
    """Score of each method less that of ``best``, in percent points: mean, and the interval of a paired t test."""
    scores = {(c["method"], c["task"], c["seed"]): 100 * c["score"] for c in cells}
    rows = []
    for method in _methods(cells):
        pairs = [
            (s, scores[best, t, seed])
            for (m, t, seed), s in scores.items()
            if m == method and (best, t, seed) in scores
        ]
        if method == best or len(pairs) < 2 or not METHODS[method].train:
            continue
        ours, theirs = zip(*pairs, strict=True)
        low, high = interval([a - b for a, b in pairs])
        mean = statistics.mean(ours) - statistics.mean(theirs)
        rows.append(
            {"method": method, "pairs": len(pairs), "difference": f"{mean:+.1f}", "95%": f"{low:+.1f} to {high:+.1f}"}
        )
    return table(rows) if rows else "No pairs."


def interval(differences: list[float]) -> tuple[float, float]:
    """Of the mean, by Student's t; both ends are the mean where nothing differs."""
    error = stats.sem(differences)
    mean = statistics.mean(differences)
    if error == 0:
        return mean, mean
    low, high = stats.t.interval(CONFIDENCE, len(differences) - 1, mean, error)
    return float(low), float(high)


def spread(values: list[float]) -> str:
    """Mean, and the standard error where there are several."""
    if not values:
        return "-"
    text = f"{statistics.mean(values):.2f}"
    return text if len(values) < 2 else f"{text} ± {statistics.stdev(values) / len(values) ** 0.5:.2f}"


def _methods(cells: Iterable[dict[str, Any]]) -> list[str]:
    there = {cell["method"] for cell in cells}
    return [method for method in METHODS if method in there]

"""Several runs side by side, as text and as a page."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from esft.errors import InputError
from esft.reporting.curves import charts_across
from esft.reporting.experts import overlap
from esft.reporting.figures import figure, share, size
from esft.reporting.page import write_page
from esft.reporting.pictures import draw_all
from esft.reporting.record import Line, RunRecord, named

# Figures of a summary in the order that interests most; others follow by their names.
_FIRST = "train_loss eval_loss trained_parameters stored_bytes seconds tokens_per_second".split()
_TEXTS: dict[str, Callable[[float], str]] = {"bytes": size, "rss": size, "memory": size}  # by the name's last word
_FALLS = ("loss",)  # last words of what is the better the lower it is

Row = tuple[str, list[str]]  # what it is, and each run's


def read_runs(runs: Sequence[str | Path]) -> list[RunRecord]:
    """Raises InputError for fewer than two, for one that is named twice, and where one has not begun."""
    if len(runs) < 2:
        raise InputError("a comparison takes at least two runs")
    places = [Path(run).resolve() for run in runs]
    if twice := next((run for run, place in zip(runs, places, strict=True) if places.count(place) > 1), None):
        raise InputError(f"{twice}: is named twice")
    return [RunRecord.read(run) for run in runs]


def comparison(records: Sequence[RunRecord]) -> list[dict[str, str]]:
    """The rows of one table: a figure or a setting each, and what every run has of it by the run's name."""
    names = named(records)
    rows = [*_beginnings(records), *_settings(records), *_results(records), *_overlaps(records, names)]
    return [{"": what, **dict(zip(names, cells, strict=True))} for what, cells in rows]


def write_comparison_page(records: Sequence[RunRecord], path: str | Path) -> None:
    """The table of ``comparison``, and the runs' curves in one chart for each figure.

    Raises DiskError when the page cannot be written.
    """
    names = named(records)
    charts = charts_across({name: record.lines for name, record in zip(names, records, strict=True)})
    parts = {
        "Begun with": _beginnings(records),
        "Settings that differ": _settings(records),
        "What they measured": _results(records),
        "Experts that both chose": _overlaps(records, names),
    }
    shown = {f"part{i}": (title, rows) for i, (title, rows) in enumerate(parts.items(), 1) if rows}
    sections = [*((id, title) for id, (title, _) in shown.items()), ("curves", "Curves")]
    write_page(
        path, "comparison.html.jinja", title=f"{len(names)} runs side by side", names=names,
        runs=list(zip(names, records, strict=True)),
        tables=shown, sections=sections, charts=draw_all(charts, path),
    )  # fmt: skip


def _beginnings(records: Sequence[RunRecord]) -> list[Row]:
    rows = [
        ("method", [record.config.method for record in records]),
        ("steps done", [f"{record.steps:,}{'' if record.summary else ' (not ended)'}" for record in records]),
    ]
    for what in ("model", "data"):
        if len({record.origin["digests"][what] for record in records}) > 1:
            rows.append((what, [record.origin[what] for record in records]))
    if any(record.selection for record in records):
        rows.append(("experts", [f"{r.selection.num_experts:,}" if r.selection else "" for r in records]))
    return rows


def _settings(records: Sequence[RunRecord]) -> list[Row]:
    """The settings that differ, but for the method, which is told anyway."""
    settings = [record.settings for record in records]
    return [
        (name, [_setting(each[name]) for each in settings])
        for name in settings[0]
        if name != "method" and any(each[name] != settings[0][name] for each in settings)
    ]


def _results(records: Sequence[RunRecord]) -> list[Row]:
    figures = [record.figures for record in records]
    found = dict.fromkeys(name for each in figures for name, value in each.items() if value and name != "steps")
    rows = [
        (_spaced(name), [_text(name)(each[name]) if name in each else "" for each in figures])
        for name in sorted(found, key=lambda name: _FIRST.index(name) if name in _FIRST else len(_FIRST))
    ]
    measured = [record.measured for record in records]
    for name in dict.fromkeys(name for lines in measured for name in lines):
        rows.append((f"best {_spaced(name)}", [_best(lines.get(name)) for lines in measured]))
    return rows


def _overlaps(records: Sequence[RunRecord], names: Sequence[str]) -> list[Row]:
    """For each run with a selection: how many of its experts every other one chose too."""
    rows = []
    for mine, name in zip(records, names, strict=True):
        if mine.selection is None or sum(record.selection is not None for record in records) < 2:
            continue
        cells = []
        for other in records:
            same = other.origin["digests"]["model"] == mine.origin["digests"]["model"]
            if other.selection is None or other is mine or not same:
                cells.append("" if other.selection is None or other is mine else "another base")
                continue
            both = sum(layer.both for layer in overlap(mine.selection, other.selection))
            cells.append(f"{both:,} ({share(both / max(1, mine.selection.num_experts))})")
        rows.append((f"of {name}'s experts", cells))
    return rows


def _best(line: Line | None) -> str:
    if line is None:
        return ""
    best = (min if _words(line.name)[-1] in _FALLS else max)(line.values)
    return f"{figure(best)} (step {line.steps[line.values.index(best)]:,})"


def _text(name: str) -> Callable[[float], str]:
    return _TEXTS.get(_words(name)[-1], figure)


def _setting(value: Any) -> str:
    return "none" if value is None else figure(value)


def _spaced(name: str) -> str:
    return name.replace("_", " ")


def _words(name: str) -> list[str]:
    return re.split(r"[\s_/.]+", name)

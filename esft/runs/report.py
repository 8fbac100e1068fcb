"""What a run did, as text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from esft.errors import LONGEST
from esft.runs.metrics import evaluations
from esft.runs.run_folder import RunFolder
from esft.storage.reading import shown


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table of rows with the same keys."""
    names = list(rows[0])
    cells = [names, *([_cell(row[name]) for name in names] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def scores_table(before: Mapping[str, float], after: Mapping[str, float]) -> str:
    """The scores on evaluation data, by their names in the metrics, before a training and after it."""
    return table([{"score": _title(name), "before": before.get(name, ""), "after": after[name]} for name in after])


def _title(figure: str) -> str:
    """The name of an evaluation's figure as a heading: "eval loss"."""
    return figure.replace("_", " ", 1)


def _plain(value: Any) -> str:
    """A text as it is where that cannot be taken for another line, and anything else as Python writes it, cut."""
    return value if isinstance(value, str) and value.isprintable() and len(value) <= LONGEST else shown(value)


def _cell(value: Any) -> str:
    if isinstance(value, float) and abs(value) >= 1e6:
        return f"{value:.3e}"
    return f"{value:.3f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def report(run: str | Path, rows: int = 12) -> str:
    """A run in a few lines: its losses and scores over time, and once it has ended what they were before and after.

    Raises InputError for a folder that is none of a run, and naming the line that holds no figures of a step.
    """
    folder = RunFolder(run)
    metrics = folder.metrics(torn=True) or folder.metrics()  # of a file that is one torn line, it is named
    train, evaluated = [m for m in metrics if "loss" in m], evaluations(metrics)
    if not train:
        return f"{run}: no step done yet"
    figures = list(dict.fromkeys(name for values in evaluated.values() for name in values))
    size = max(1, -(-len(train) // rows))
    lines = []
    for part in (train[i : i + size] for i in range(0, len(train), size)):
        held_out = [evaluated[m["step"]] for m in part if m["step"] in evaluated]
        lines.append(
            {
                "steps": f"{part[0]['step']}-{part[-1]['step']}",
                "loss": sum(m["loss"] for m in part) / len(part),
                **{_title(name): held_out[-1].get(name, "") if held_out else "" for name in figures},
                "lr": f"{part[-1]['lr']:.2e}",
                "tokens/s": round(sum(m["tokens_per_second"] for m in part) / len(part)),
            }
        )
    text, summary = table(lines), folder.summary()
    if summary is None:
        return text
    before, after = (_figures(summary.get(name)) for name in ("before", "after"))
    if after:
        text += "\n\n" + scores_table(before, after)
    rest = {name: value for name, value in summary.items() if name not in ("before", "after") or not after}
    return text + "\n\n" + "\n".join(f"{_plain(name)}: {_plain(value)}" for name, value in rest.items())


def _figures(values: Any) -> dict[str, float]:
    """What a summary has of scores; nothing where that is something else."""
    fits = isinstance(values, dict) and all(type(each) in (int, float) for each in values.values())
    return {shown(name)[1:-1]: value for name, value in values.items()} if fits else {}

"""What a run did, as text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from esft.errors import LONGEST
from esft.runs.run_folder import RunFolder
from esft.storage.reading import shown


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table of rows with the same keys."""
    names = list(rows[0])
    cells = [names, *([_cell(row[name]) for name in names] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def _plain(value: Any) -> str:
    """A text as it is where that cannot be taken for another line, and anything else as Python writes it, cut."""
    return value if isinstance(value, str) and value.isprintable() and len(value) <= LONGEST else shown(value)


def _cell(value: Any) -> str:
    if isinstance(value, float) and abs(value) >= 1e6:
        return f"{value:.3e}"
    return f"{value:.3f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def report(run: str | Path, rows: int = 12) -> str:
    """A run in a few lines: its losses over time, and its summary once it has ended.

    Raises InputError for a folder that is none of a run, and naming the line that holds no figures of a step.
    """
    folder = RunFolder(run)
    metrics = folder.metrics()
    train = [m for m in metrics if "loss" in m]
    evaluated = {m["step"]: m["eval_loss"] for m in metrics if "eval_loss" in m}
    if not train:
        return f"{run}: no step done yet"
    size = max(1, -(-len(train) // rows))
    parts = [train[i : i + size] for i in range(0, len(train), size)]
    lines = []
    for part in parts:
        held_out = [evaluated[m["step"]] for m in part if m["step"] in evaluated]
        lines.append(
            {
                "steps": f"{part[0]['step']}-{part[-1]['step']}",
                "loss": sum(m["loss"] for m in part) / len(part),
                "eval loss": held_out[-1] if held_out else "",
                "lr": f"{part[-1]['lr']:.2e}",
                "tokens/s": round(sum(m["tokens_per_second"] for m in part) / len(part)),
            }
        )
    text = table(lines)
    if (summary := folder.summary()) is not None:
        text += "\n\n" + "\n".join(f"{_plain(name)}: {_plain(value)}" for name, value in summary.items())
    return text

"""What a run did, as text and pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from esft.errors import InputError
from esft.files import read_json, read_text
from esft.score import ExpertScores
from esft.select import ExpertSelection

METRICS = "metrics.jsonl"
SUMMARY = "summary.json"


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table of rows with the same keys."""
    names = list(rows[0])
    cells = [names, *([_cell(row[name]) for name in names] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def _cell(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def read_metrics(run: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics file. Raises InputError naming file and line."""
    path = Path(run) / METRICS
    if not path.is_file():
        raise InputError(f"{run}: not a run folder (no {METRICS})")
    lines = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}: line {number}: not JSON ({error.msg})") from error
        if not isinstance(values, dict) or not isinstance(values.get("step"), int):
            raise InputError(f"{path}: line {number}: names no step")
        if "loss" in values and not {"lr", "tokens_per_second"} <= values.keys():
            raise InputError(f"{path}: line {number}: a loss without lr and tokens_per_second")
        lines.append(values)
    return lines


def report(run: str | Path, rows: int = 12) -> str:
    """A run in a few lines: its losses over time, and its summary once it has ended."""
    metrics = read_metrics(run)
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
    summary = Path(run) / SUMMARY
    if summary.is_file():
        values = read_json(summary)
        if not isinstance(values, dict):
            raise InputError(f"{summary}: not a run's summary")
        text += "\n\n" + "\n".join(f"{name}: {value}" for name, value in values.items())
    return text


def plot_scores(
    scores: ExpertScores, selection: ExpertSelection, path: str | Path, title: str = "", by: str = "token"
) -> Path:
    """A PNG of every expert's score, layers downwards, experts by falling score, the chosen ones framed.

    Needs matplotlib (extra ``plot``).
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
        from matplotlib.patches import Rectangle
    except ModuleNotFoundError as error:
        raise InputError("a picture needs matplotlib: pip install 'esft[plot]'") from error
    per_layer = scores.token_scores if by == "token" else scores.gate_scores
    layers = list(per_layer)
    ranked = {layer: sorted(per_layer[layer].items(), key=lambda item: (-item[1], item[0])) for layer in layers}
    values = [[score for _, score in ranked[layer]] for layer in layers]
    width = max(len(row) for row in values)
    figure, axes = plt.subplots(figsize=(max(6, width * 0.34), 1.6 + 0.42 * len(layers)), layout="constrained")
    image = axes.imshow(values, aspect="auto", cmap="viridis")
    for row, layer in enumerate(layers):
        for column, (expert, _) in enumerate(ranked[layer]):
            if width <= 64:
                axes.text(column, row, str(expert), ha="center", va="center", fontsize=6, color="white")
            if expert in selection.experts.get(layer, []):
                axes.add_patch(
                    Rectangle((column - 0.46, row - 0.44), 0.92, 0.88, fill=False, edgecolor="red", linewidth=1.8)
                )
    axes.set_yticks(range(len(layers)), [str(layer) for layer in layers])
    axes.set_ylabel("layer")
    axes.set_xlabel("experts by falling score (the number is the expert's id; framed: chosen)")
    axes.set_title(title or f"{by} scores, {selection.num_experts} experts chosen")
    figure.colorbar(image, ax=axes, label=f"{by} score")
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return Path(path)

"""A picture of the scores, with the chosen experts marked."""

from __future__ import annotations

import math
from pathlib import Path

from esft.errors import InputError, first_line
from esft.scoring.expert_scores import ExpertScores
from esft.selection import ExpertSelection
from esft.storage.files import whole_file

_MARK = "esft select"
_MARKS = {"png": {"Software": _MARK}, "pdf": {"Creator": _MARK}, "svg": {"Creator": _MARK}}  # where each format has it

_NUMBERED = 4096  # experts of which each has its number


def plot_scores(
    scores: ExpertScores, selection: ExpertSelection, path: str | Path, title: str = "", by: str = "token"
) -> Path:
    """A PNG of every expert's score, layers downwards, experts by falling score, the chosen ones framed.

    Needs matplotlib (extra ``plot``). Raises InputError without it and for a name that ends in no format it has,
    DiskError when the file cannot be written, and then leaves what was there.
    """
    path = Path(path)
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
        from matplotlib.collections import PatchCollection
        from matplotlib.patches import Rectangle
    except ModuleNotFoundError as error:
        raise InputError("a picture needs matplotlib: pip install 'esft[plot]'") from error
    except ValueError as error:  # of what MPLBACKEND says
        raise InputError(f"matplotlib cannot be used ({first_line(error)})") from error
    per_layer = getattr(scores, f"{by}_scores")
    layers = list(per_layer)
    ranked = {layer: sorted(per_layer[layer].items(), key=lambda item: (-item[1], item[0])) for layer in layers}
    width = max(map(len, ranked.values()))
    nothing = [math.nan] * width  # layers may have fewer experts than others
    values = [([score for _, score in ranked[layer]] + nothing)[:width] for layer in layers]
    figure, axes = plt.subplots(
        figsize=(_inches(6, width * 0.34), _inches(2, 1.6 + 0.42 * len(layers))), layout="constrained"
    )
    image = axes.imshow(values, aspect="auto", cmap="viridis")
    frames, few = [], sum(map(len, ranked.values())) <= _NUMBERED
    for row, layer in enumerate(layers):
        chosen = set(selection.experts.get(layer, []))
        for column, (expert, _) in enumerate(ranked[layer]):
            if width <= 64 and few:
                axes.text(column, row, str(expert), ha="center", va="center", fontsize=6, color="white")
            if expert in chosen:
                frames.append(
                    Rectangle((column - 0.46, row - 0.44), 0.92, 0.88, fill=False, edgecolor="red", linewidth=1.8)
                )
    for frame in frames if few else ():
        axes.add_patch(frame)
    if not few:  # drawn one by one, tens of thousands take minutes
        axes.add_collection(PatchCollection(frames, match_original=True))
    axes.set_yticks(range(len(layers)), [str(layer) for layer in layers])
    axes.set_ylabel("layer")
    axes.set_xlabel("experts by falling score (the number is the expert's id; framed: chosen)")
    axes.set_title(title or f"{by} scores, {selection.num_experts} experts chosen")
    figure.colorbar(image, ax=axes, label=f"{by} score")
    try:
        with whole_file(path) as file:
            kind = path.suffix[1:].lower()
            figure.savefig(file, dpi=130, format=kind, metadata=_MARKS.get(kind))
    except ValueError as error:
        raise InputError(f"{path}: cannot be drawn ({first_line(error)})") from error
    finally:
        plt.close(figure)
    return path


def check_plot(path: Path) -> None:
    """Raise InputError for a file that is no picture of ``plot_scores``."""
    content = path.read_bytes()
    if not content.startswith((b"\x89PNG", b"%PDF", b"<?xml")) or _MARK.encode() not in content:
        raise InputError("not a picture that esft has drawn")


def _inches(least: float, wanted: float) -> float:
    """A side of the picture; one beyond a hundred inches would take gigabytes to draw."""
    return min(max(least, wanted), 100)

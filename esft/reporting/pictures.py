"""Charts as pictures within a page: SVG from matplotlib, one for light and one for dark surroundings."""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esft.errors import InputError, first_line
from esft.reporting.curves import Chart, are_noisy, is_long, smoothed
from esft.reporting.experts import LEVELS, LayerLoad
from esft.reporting.record import Line
from esft.text import printable

INCHES = (4.6, 2.9)  # about as wide as a phone, so that letters keep their size there
# Okabe and Ito's colours, which colour-blind readers tell apart; dashes and markers say the same without colours.
_STYLES = (("-", "o"), ("--", "s"), ("-.", "^"), (":", "D"), ((0, (5, 1)), "v"), ((0, (3, 1, 1, 1)), "P"))


@dataclass(frozen=True)
class _Surroundings:
    """Colours of letters and axes, of the grid, and of the lines in their order."""

    ink: str
    grid: str
    lines: tuple[str, ...]


_LIGHT = _Surroundings("#1b1b1b", "#d0d0d0", ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"))
_DARK = _Surroundings("#e6e6e6", "#484848", ("#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#F0E442", "#D55E00"))
_LEGEND = 30  # characters of a name
MOST_CHARTS, MOST_LINES = 40, 50  # of a page, and of a chart; each chart takes some tenths of a second
_MARKED = 12  # values up to which each gets its marker


@dataclass(frozen=True)
class Picture:
    """A chart in both surroundings, as addresses that hold the whole picture, and the same in words."""

    light: str
    dark: str
    text: str


def draw(chart: Chart) -> Picture:
    """Values over steps. Raises InputError without matplotlib (extra ``plot``)."""
    return _both(chart.lines, chart.description, "step")


def draw_all(charts: Sequence[Chart], what: str | Path) -> list[tuple[Chart, Picture]]:
    """``draw`` of a page's charts, with a warning where there is more than a page has room for.

    Args:
        what: the page is about, for the warning.
    """
    if len(charts) > MOST_CHARTS or any(len(chart.lines) > MOST_LINES for chart in charts):
        most = f"the first {MOST_CHARTS} charts are drawn, and the first {MOST_LINES} lines of each"
        warnings.warn(f"{what}: has more figures than a page shows; {most}", stacklevel=2)
    shown = [Chart(chart.title, chart.lines[:MOST_LINES]) for chart in charts[:MOST_CHARTS]]
    return [(chart, draw(chart)) for chart in shown]


def draw_loads(loads: Sequence[LayerLoad]) -> Picture:
    """Shares of rows on the chosen experts over layers, before and after."""
    layers = [load.layer for load in loads]
    shares = {name: [getattr(load, name) for load in loads] for name in ("before", "after")}
    lines = [
        Line(name, layers, [100 * value for value in values]) for name, values in shares.items() if None not in values
    ]
    said = " ".join(f"{line.name}: {min(line.values):.1f}% to {max(line.values):.1f}%." for line in lines)
    return _both(lines, f"Line chart of the share of rows on the chosen experts, layer by layer. {said}", "layer", "%")


def heat_colours() -> list[tuple[str, str]]:
    """The colour of each level of a heatmap, from dark to light, and of letters on it."""
    matplotlib = _matplotlib()
    colours = [matplotlib.colormaps["cividis"](level / (LEVELS - 1))[:3] for level in range(LEVELS)]
    return [(matplotlib.colors.to_hex(colour), "#000" if _is_light(colour) else "#fff") for colour in colours]


def _is_light(colour: Sequence[float]) -> bool:
    """Whether black letters stand out more on it than white ones, by the relative luminance of WCAG 2."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
    luminance = sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
    return (luminance + 0.05) ** 2 > 1.05 * 0.05


def _matplotlib() -> Any:
    try:
        import matplotlib
        import matplotlib.colors
        import matplotlib.figure
        import matplotlib.ticker
    except ModuleNotFoundError as error:
        raise InputError("a page's charts need matplotlib: pip install 'esft[plot]'") from error
    except ValueError as error:  # of what MPLBACKEND says
        raise InputError(f"matplotlib cannot be used ({first_line(error)})") from error
    return matplotlib


def _both(lines: Sequence[Line], text: str, over: str, unit: str = "") -> Picture:
    return Picture(*(_svg(lines, over, unit, surroundings) for surroundings in (_LIGHT, _DARK)), text)


def _svg(lines: Sequence[Line], over: str, unit: str, surroundings: _Surroundings) -> str:
    matplotlib, ink, smooth = _matplotlib(), surroundings.ink, are_noisy(lines)
    settings = {
        "font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "esft", "text.parse_math": False, "text.color": ink,
        "axes.labelcolor": ink, "axes.edgecolor": ink, "xtick.color": ink, "ytick.color": ink,
        "grid.color": surroundings.grid, "axes.spines.top": False, "axes.spines.right": False,
    }  # fmt: skip
    with matplotlib.rc_context(settings):
        figure = matplotlib.figure.Figure(INCHES, layout="constrained")
        axes = figure.subplots()
        for i, line in enumerate(lines):
            colour = surroundings.lines[i % len(surroundings.lines)]
            _add(axes, line, smooth and is_long(line), colour, *_STYLES[i % len(_STYLES)])
        axes.set_xlabel(over)
        axes.set_ylabel(unit)
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(nbins=6, integer=True))
        axes.grid(True, linewidth=0.5)
        if len(lines) > 1:
            axes.legend(frameon=False, fontsize=8, ncols=1 if len(lines) < 4 else 2)
        file = io.BytesIO()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph")  # missing from matplotlib's font: the browser draws the letters
            figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(file.getvalue()).decode()}"


def _add(axes: Any, line: Line, smooth: bool, colour: str, dashes: Any, marker: str) -> None:
    """A line with markers, in short ones at every value; where it is to be smooth, its mean over the values in pale."""
    name = printable(line.name if len(line.name) <= _LEGEND else f"{line.name[:_LEGEND]}...")
    every = max(1, len(line.values) // 8) if len(line.values) > _MARKED else 1
    if smooth:
        axes.plot(line.steps, line.values, color=colour, alpha=0.4, linewidth=0.7)
    axes.plot(
        line.steps, smoothed(line.values) if smooth else line.values, label=name, color=colour, linestyle=dashes,
        marker=marker, markersize=4, markevery=every,
    )  # fmt: skip

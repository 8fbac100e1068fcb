"""Which figures of runs are drawn together, and what such a chart says in words and as a table."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from esft.reporting.figures import figure
from esft.reporting.record import Line

MOST_ROWS = 24  # of a chart's table
AROUND = 10  # values before and after one, whose mean is drawn over a noisy line


@dataclass(frozen=True)
class Chart:
    """Lines over the same axes."""

    title: str
    lines: list[Line]

    @property
    def description(self) -> str:
        """The chart in words."""
        return f"Line chart of {self.title} over training steps. " + " ".join(map(_described, self.lines))

    @property
    def note(self) -> str:
        """What has to be said of how it is drawn; empty where nothing has."""
        return f"Pale: every value. Strong: the mean of {2 * AROUND + 1} around each." if are_noisy(self.lines) else ""

    @property
    def table(self) -> list[list[str]]:
        """Spans of steps in order, and of each the last value of every line, "" where it has none."""
        steps = sorted({step for line in self.lines for step in line.steps})
        size = max(1, -(-len(steps) // MOST_ROWS))
        spans = [steps[i : i + size] for i in range(0, len(steps), size)]
        values = [dict(zip(line.steps, line.values, strict=True)) for line in self.lines]
        rows = []
        for span in spans:
            last = [next((of[step] for step in reversed(span) if step in of), None) for of in values]
            name = f"{span[0]:,}" if len(span) == 1 else f"{span[0]:,}-{span[-1]:,}"
            rows.append([name, *("" if value is None else figure(value) for value in last)])
        return rows


def charts_of(lines: Mapping[str, Line]) -> list[Chart]:
    """One run's figures: those whose names end in the same word share a chart, as they have the same unit."""
    groups: dict[str, list[Line]] = {}
    for name, line in lines.items():
        groups.setdefault(_words(name)[-1], []).append(line)
    return [Chart(_common([line.name for line in group]), group) for group in groups.values()]


def charts_across(runs: Mapping[str, Mapping[str, Line]]) -> list[Chart]:
    """The figures of several runs by their names: a chart for each figure, with a line for each run that has it."""
    figures = dict.fromkeys(name for lines in runs.values() for name in lines)
    return [
        Chart(
            " ".join(_words(name)),
            [Line(run, lines[name].steps, lines[name].values) for run, lines in runs.items() if name in lines],
        )
        for name in figures
    ]


def is_long(line: Line) -> bool:
    """Whether it has as many values as a mean is made of."""
    return len(line.values) > 2 * AROUND


def are_noisy(lines: Sequence[Line]) -> bool:
    """Whether means say more than values: a long line goes up and down several times as far as from end to end."""
    for line in filter(is_long, lines):
        way = sum(abs(b - a) for a, b in zip(line.values, line.values[1:], strict=False))
        if way > 3 * (max(line.values) - min(line.values)):
            return True
    return False


def smoothed(values: list[float], around: int = AROUND) -> list[float]:
    """The mean of every value and those around it, as many before as after, fewer near the ends: it does not lag."""
    means = []
    for i in range(len(values)):
        reach = min(around, i, len(values) - 1 - i)
        part = values[i - reach : i + reach + 1]
        means.append(sum(part) / len(part))
    return means


def _described(line: Line) -> str:
    least, most = min(line.values), max(line.values)
    at = {value: step for step, value in zip(reversed(line.steps), reversed(line.values), strict=True)}
    return (
        f"{line.name}: {figure(line.values[0])} at step {line.steps[0]}, {figure(line.values[-1])} at step "
        f"{line.steps[-1]}; lowest {figure(least)} at step {at[least]}, highest {figure(most)} at step {at[most]}."
    )


def _words(name: str) -> list[str]:
    return [word for word in re.split(r"[\s_/.]+", name) if word] or [name]


def _common(names: list[str]) -> str:
    """The words that all names end in."""
    columns = zip(*(reversed(_words(name)) for name in names), strict=False)
    common = [words[0] for words in columns if len(set(words)) == 1]
    return " ".join(reversed(common)) if len(names) > 1 else " ".join(_words(names[0]))

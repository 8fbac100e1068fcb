"""How far a run is, on a terminal."""

from __future__ import annotations

import logging
import time

from tqdm import tqdm

from esft.memory import peak_memory, peak_rss

logger = logging.getLogger("esft")

FIRST = 2  # steps that say nothing about those to come: libraries prepare themselves
TRIED = 5  # after those, how many say how long the rest takes
SHORTEST = 60.0  # seconds that are worth a line


class Bar:
    """The steps of a run as a bar, with the time that is left; and once, that time in a line. A context manager.

    Args:
        name: of the method.
        steps: of the whole run, and ``first`` those that are done.
        shown: the bar, on standard error.
    """

    def __init__(self, name: str, steps: int, first: int, shown: bool):
        self.left, self.count, self.began = steps - first, 0, 0.0
        self._bar = tqdm(total=steps, initial=first, desc=name, disable=not shown, unit="step", dynamic_ncols=True)

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def step(self, loss: float, tokens_per_second: float, supervised: float) -> None:
        """One more is done.

        Args:
            loss: mean of the last ones.
            supervised: share of the tokens.
        """
        figures = {"loss": f"{loss:.3f}", "tok/s": f"{tokens_per_second:,.0f}", "mem": f"{_taken():.1f}GiB"}
        self._bar.set_postfix(figures | {"supervised": f"{supervised:.0%}"}, refresh=False)
        self._bar.update()
        self.count += 1
        if self.count == FIRST:
            self.began = time.monotonic()
        elif self.count == FIRST + TRIED:
            self._tell((time.monotonic() - self.began) / TRIED)

    def _tell(self, seconds: float) -> None:
        """A line about the time that is left, evaluations and checkpoints not counted."""
        left = self.left - self.count
        if seconds * left >= SHORTEST:
            span = _span(seconds * left)
            logger.info("about %s to go: %d steps of %.2g s; %.1f GiB at most so far", span, left, seconds, _taken())


def _taken() -> float:
    """GiB that were taken at most: on the GPUs, or without one by the process."""
    return (peak_memory() or peak_rss()) / 2**30


def _span(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"

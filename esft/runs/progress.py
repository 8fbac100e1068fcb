"""How far a run is, on a terminal."""

from __future__ import annotations

from tqdm import tqdm


class Bar:
    """The steps of a run as a bar, with the time that is left. A context manager.

    Args:
        name: of the method.
        steps: of the whole run, and ``first`` those that are done.
        shown: on standard error.
    """

    def __init__(self, name: str, steps: int, first: int, shown: bool):
        self._bar = tqdm(total=steps, initial=first, desc=name, disable=not shown, unit="step")

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def step(self, loss: float) -> None:
        """One more is done; the loss is the mean of the last ones."""
        self._bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        self._bar.update()

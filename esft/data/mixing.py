"""Several sources in one: each record once an epoch, by weight, or general data mixed in with a share."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from esft.data.examples import Examples
from esft.data.sources import DataSource
from esft.errors import InputError


def weights_of(sources: Sequence[DataSource]) -> list[float] | None:
    """The sources' weights, None where none has one. Raises InputError where only some have."""
    weights = [source.weight for source in sources if source.weight is not None]
    if weights and len(weights) < len(sources):
        without = next(source for source in sources if source.weight is None)
        raise InputError(f"{without.name}: has no weight, and other data has: give all a weight, as {without.name}:1")
    return weights or None


def mixed_in(text: str) -> DataSource:
    """A source of general data and its share, as DATA:SHARE. Raises InputError unless the share is below 1."""
    source = DataSource.of(text)
    if source.weight is None or source.weight >= 1:
        raise InputError(f"{text}: mixed in is a share of the records below 1, as {source.name}:0.25")
    return source


def mixed_weights(sizes: Sequence[int], weights: Sequence[float] | None, share: float) -> list[float]:
    """Weights of a task's sources and of what is mixed in behind them, by which this share of the examples comes of it.

    Args:
        sizes: examples of all sources, the last of which is mixed in.
        weights: of the task's sources; None where each of their examples comes as often as the others.
        share: in (0, 1).
    """
    of_task = sizes[:-1] if weights is None else weights
    return [*((1 - share) * weight / sum(of_task) for weight in of_task), share]


def end_to_end(parts: Sequence[Examples], mixed: bool = False) -> Examples:
    """The examples of several sources, one source after the other; the last one's may be mixed in."""
    if len(parts) == 1:
        return parts[0]
    ends, before = [], 0
    for part in parts:
        ends.append(part.ends + before)
        before += len(part.ids)
    return Examples(
        np.concatenate([part.ids for part in parts]),
        np.concatenate([part.counted for part in parts]),
        np.concatenate(ends),
        sum(part.records for part in parts),
        sum(part.truncated for part in parts),
        sum(map(len, parts[:-1])) if mixed else None,
    )


@dataclass(frozen=True)
class Mix:
    """How often the examples of several sources, end to end, come in an epoch.

    An epoch has as many examples as there are. Of each source it has its share by weight (at least one): the next so
    many of passes over the source that go on from epoch to epoch, each pass in an order of its own. So a source with a
    small share is seen whole in several epochs, and one with a large share more than once in one.
    """

    sizes: Sequence[int]
    weights: Sequence[float]

    def drawn(self, seed: int, epoch: int) -> list[int]:
        """The examples of an epoch, a function of the arguments alone."""
        total, first, found = sum(self.sizes), 0, []
        for source, (size, weight) in enumerate(zip(self.sizes, self.weights, strict=True)):
            count = max(1, round(total * weight / sum(self.weights)))
            orders: dict[int, list[int]] = {}
            for place in range(epoch * count, (epoch + 1) * count):
                number, at = divmod(place, size)
                if number not in orders:
                    orders[number] = list(range(first, first + size))
                    random.Random(f"{seed}/{source}/{number}").shuffle(orders[number])
                found.append(orders[number][at])
            first += size
        return found

"""Records as tokens: one of them, and all of a source."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np

IGNORE = -100  # label of a position without loss


@dataclass(frozen=True)
class Example:
    """A row of tokens: one document, or several end to end.

    Attributes:
        ids: token ids.
        labels: ``ids[i]`` where the loss covers it, else IGNORE.
        starts: where in the row each document begins. The first token of any but the first has no label: nothing of
            its own document comes before it.
        mixed: the numbers of those documents that are not the task's but mixed in.
    """

    ids: list[int]
    labels: list[int]
    starts: tuple[int, ...] = (0,)
    mixed: tuple[int, ...] = ()

    @property
    def targets(self) -> int:
        """Tokens that are predicted and counted; nothing comes before the first."""
        return sum(label != IGNORE for label in self.labels[1:])

    def cut(self, start: int, end: int) -> Example:
        """A part of a row that is one document."""
        return Example(self.ids[start:end], self.labels[start:end], mixed=self.mixed)


def joined(documents: Sequence[Example]) -> Example:
    """Documents, or rows of them, end to end in one row."""
    ids: list[int] = []
    labels: list[int] = []
    starts: list[int] = []
    mixed: list[int] = []
    for document in documents:
        mixed += [len(starts) + number for number in document.mixed]
        starts += [len(ids) + start for start in document.starts]
        ids += document.ids
        labels += [IGNORE, *document.labels[1:]] if labels else document.labels
    return Example(ids, labels, tuple(starts), tuple(mixed))


class Examples(Sequence[Example]):
    """The examples of a source in flat arrays: 5 bytes a token, whatever their number.

    Attributes:
        ids: int32 [N], all token ids end to end.
        counted: bool [N], where the loss is.
        ends: int64 [R], where each example ends.
        records: of the source; those without an answer within the length are no examples.
        truncated: records that are longer than the length, or as long.
        mixed_from: the number of the first example that is mixed in, as are all behind it; None where none is.
    """

    def __init__(
        self,
        ids: np.ndarray,
        counted: np.ndarray,
        ends: np.ndarray,
        records: int,
        truncated: int,
        mixed_from: int | None = None,
    ):
        self.ids, self.counted, self.ends = ids, counted, ends
        self.records, self.truncated, self.mixed_from = records, truncated, mixed_from

    @classmethod
    def of(cls, examples: Iterable[Example], records: int, truncated: int) -> Examples:
        ids, counted, ends = [np.zeros(0, np.int32)], [np.zeros(0, bool)], []
        end = 0
        for example in examples:
            ids.append(np.array(example.ids, np.int32))
            counted.append(np.array(example.labels, np.int32) != IGNORE)
            ends.append(end := end + len(example.ids))
        return cls(np.concatenate(ids), np.concatenate(counted), np.array(ends, np.int64), records, truncated)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each, int64 [R]."""
        return np.diff(self.ends, prepend=0)

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        part = slice(int(self.ends[place - 1]) if place else 0, int(self.ends[place]))
        ids, counted = self.ids[part], self.counted[part]
        mixed = (0,) if self.mixed_from is not None and place >= self.mixed_from else ()
        return Example(ids.tolist(), np.where(counted, ids, IGNORE).tolist(), mixed=mixed)

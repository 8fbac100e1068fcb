"""Laying documents into rows of one length, so that little of a row is padding."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass

from esft.data.examples import Example, joined


@dataclass(frozen=True)
class Piece:
    """A part of an example: tokens from ``start`` to ``end``."""

    example: int
    start: int
    end: int


Row = list[Piece]


def packed(lengths: Sequence[int], order: Sequence[int], length: int, strategy: str) -> list[Row]:
    """Rows of at most ``length`` tokens, of all that the order names.

    Args:
        lengths: tokens of every example.
        order: of examples; may name one again.
        strategy: "bfd" or "wrapped", TRL's names. "bfd" keeps examples whole, but for the end of what is longer than a
            row: the longest that is left opens a row, others come as the order has them, and the one or two that fit
            best close it. (TRL takes all in decreasing length, which uses the short ones up: see docs/data.md.)
            "wrapped": end to end, cut where a row is full; the parts are documents of their own.
    """
    if strategy == "wrapped":
        return _wrapped(lengths, order, length)
    return _best_fit([Piece(i, 0, min(lengths[i], length)) for i in order], length)


def _best_fit(pieces: Sequence[Piece], length: int) -> list[Row]:
    waiting: dict[int, deque[int]] = {}  # length -> the places of its pieces, in order
    for place, piece in enumerate(pieces):
        waiting.setdefault(piece.end, deque()).append(place)
    sizes, taken, first = sorted(waiting), bytearray(len(pieces)), 0
    rows: list[Row] = []

    def take(size: int, earliest: bool = False) -> Piece:
        """A piece of this length; whoever goes by the order gets the earliest, so that the others come from behind."""
        place = waiting[size].popleft() if earliest else waiting[size].pop()
        if not waiting[size]:
            del waiting[size], sizes[bisect_left(sizes, size)]
        taken[place] = True
        return pieces[place]

    while sizes:
        rows.append(row := [take(sizes[-1])])
        room = length - row[0].end
        while sizes and room >= sizes[0]:
            if room >= sizes[-1] + 2 * sizes[0]:  # whichever comes next fits, and leaves room for two
                while taken[first]:
                    first += 1
                row.append(take(pieces[first].end, earliest=True))
                room -= row[-1].end
                continue
            for size in _closing(sizes, waiting, room):
                row.append(take(size))
                room -= size
    return rows


def _closing(sizes: Sequence[int], waiting: Mapping[int, Sized], room: int) -> list[int]:
    """The one or two lengths of those waiting that leave the least of a room; one at least fits."""
    low, high = 0, bisect_right(sizes, room) - 1
    best = [sizes[high]]
    while low <= high and sum(best) < room:
        both = [sizes[low], sizes[high]]
        if sum(both) > room:
            high -= 1
            continue
        if sum(both) >= sum(best) and (low < high or len(waiting[both[0]]) > 1):
            best = both
        low += 1
    return best


def _wrapped(lengths: Sequence[int], order: Sequence[int], length: int) -> list[Row]:
    rows: list[Row] = []
    room = 0
    for i in order:
        start = 0
        while start < lengths[i]:
            if not room:
                rows.append([])
                room = length
            end = min(start + room, lengths[i])
            rows[-1].append(Piece(i, start, end))
            room -= end - start
            start = end
    return rows


def laid(row: Row, examples: Sequence[Example]) -> Example:
    """A row's tokens."""
    return joined([examples[piece.example].cut(piece.start, piece.end) for piece in row])

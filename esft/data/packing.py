"""Laying documents into rows of one length, so that little of a row is padding."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
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
        order: of examples, which decides among those of one length, and where "wrapped" cuts.
        strategy: as TRL names them. "bfd", best fit decreasing: from the longest to the shortest, each into the row
            that it leaves least room in; what is longer than a row is cut. "wrapped": end to end, cut where a row is
            full; the parts are documents of their own.

    How many rows there are depends on the lengths alone.
    """
    if strategy == "wrapped":
        return _wrapped(lengths, order, length)
    pieces = [Piece(i, 0, min(lengths[i], length)) for i in order]
    return _best_fit(sorted(pieces, key=lambda piece: -piece.end), length)


def _best_fit(pieces: Sequence[Piece], length: int) -> list[Row]:
    rows: list[Row] = []
    having: dict[int, list[Row]] = {}  # room -> the rows that have it
    rooms: list[int] = []  # sorted
    for piece in pieces:
        size = piece.end - piece.start
        place = bisect_left(rooms, size)
        if place == len(rooms):
            rows.append(row := [])
            room = length
        else:
            room = rooms[place]
            row = having[room].pop()
            if not having[room]:
                del having[room], rooms[place]
        row.append(piece)
        if room > size:
            if room - size not in having:
                having[room - size] = []
                insort(rooms, room - size)
            having[room - size].append(row)
    return rows


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
    documents = []
    for piece in row:
        example = examples[piece.example]
        whole = piece.end - piece.start == len(example.ids)
        documents.append(example if whole else example.cut(piece.start, piece.end))
    return joined(documents)

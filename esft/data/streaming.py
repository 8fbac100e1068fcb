"""Batches of data that need not fit the memory: read and encoded while it is trained on."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import count, islice

from esft.data.batches import Packing, epoch_batches, packed_batches
from esft.data.encoding import TOGETHER, Encoder
from esft.data.examples import Example
from esft.data.mixing import weights_of
from esft.data.packing import laid
from esft.data.records import Record
from esft.data.sources import DataSource
from esft.errors import InputError

BATCHES = 32  # that are held, encoded, at a time; as many as share their examples where all are in memory


def streamed(
    sources: Sequence[DataSource],
    encoder: Encoder,
    batch_size: int,
    seed: int,
    first: int = 0,
    packing: Packing | None = None,
) -> Iterator[list[Example]]:
    """The rows of every step from ``first`` on, without end, as ``batches.steps`` has them.

    Sources are read in their order, from the beginning again at their end: one after another, or drawn from by weight.
    Records are shuffled among those of 32 batches. What came before ``first`` is read again. Raises InputError as
    reading and encoding do, and for a source of which nothing is left.
    """
    examples = _examples(sources, encoder, seed)
    for number in count():
        if packing is None:
            held = list(islice(examples, BATCHES * batch_size))
            batches = [[held[i] for i in batch] for batch in epoch_batches(held, batch_size, seed, number)]
        else:
            held = list(_upto(examples, BATCHES * batch_size * packing.length))
            packed = packed_batches(held, batch_size, seed, number, packing)
            batches = [[laid(row, held) for row in batch] for batch in packed]
        yield from batches[first:]
        first = max(0, first - len(batches))


def _upto(examples: Iterator[Example], tokens: int) -> Iterator[Example]:
    """The next examples, of so many tokens and perhaps some more."""
    for example in examples:
        yield example
        tokens -= len(example.ids)
        if tokens <= 0:
            return


def _examples(sources: Sequence[DataSource], encoder: Encoder, seed: int) -> Iterator[Example]:
    weights, drawn = weights_of(sources), random.Random(f"{seed}/sources")
    streams = [_endless(source, encoder) for source in sources]
    if weights is not None:
        while True:
            yield next(drawn.choices(streams, weights)[0])
    while True:
        for source in sources:
            yield from _once(source, encoder)


def _endless(source: DataSource, encoder: Encoder) -> Iterator[Example]:
    while True:
        yield from _once(source, encoder)


def _once(source: DataSource, encoder: Encoder) -> Iterator[Example]:
    """The examples of one pass over a source."""
    records, found = source.records(streaming=True), False
    while part := list[Record](islice(records, TOGETHER)):
        for example, _ in encoder.encode_some(part, source=source.name):
            if example.targets:
                found = True
                yield example
    if not found:
        raise InputError(f"{source.name}: holds no record with an answer within {encoder.max_length} tokens")

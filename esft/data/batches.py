"""Examples to batches."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from esft.data.examples import IGNORE, Example, Examples
from esft.data.mixing import Mix
from esft.data.packing import Row, laid, packed


def collated_length(longest: int) -> int:
    """Of the rows of a batch, by the longest of them."""
    return -(-longest // 8) * 8


def collate(examples: Sequence[Example], pad: int, left: bool = False) -> dict[str, Tensor]:
    """Pad to the longest: input_ids, attention_mask and labels, int64 [B, L]. Padding on the right unless ``left``.

    L is a multiple of 8: matrix units like that, and libraries that prepare code per shape meet few shapes. Where a row
    holds several documents there are position_ids as well, which begin anew with each document and with the padding:
    with these, and without a mask, no document sees another. Where documents are mixed in there is "mixed", bool
    [B, L].
    """
    length = collated_length(max(len(e.ids) for e in examples))

    def padded(values: list[int], fill: int) -> list[int]:
        gap = [fill] * (length - len(values))
        return gap + values if left else values + gap

    batch = {
        "input_ids": torch.tensor([padded(e.ids, pad) for e in examples]),
        "attention_mask": torch.tensor([padded([1] * len(e.ids), 0) for e in examples]),
        "labels": torch.tensor([padded(e.labels, IGNORE) for e in examples]),
    }
    if any(len(e.starts) > 1 for e in examples):
        batch["position_ids"] = torch.tensor([_positions(e, length) for e in examples])
    if any(e.mixed for e in examples):
        batch["mixed"] = torch.tensor([padded(_mixed(e), 0) for e in examples], dtype=torch.bool)
    return batch


def _mixed(example: Example) -> list[int]:
    """1 where a row's documents are mixed in, else 0."""
    ends = [*example.starts[1:], len(example.ids)]
    return [
        int(number in example.mixed)
        for number, (start, end) in enumerate(zip(example.starts, ends, strict=True))
        for _ in range(start, end)
    ]


def _positions(example: Example, length: int) -> list[int]:
    """Places within the documents of a row, and within what is behind them."""
    ends = [*example.starts[1:], len(example.ids), length]
    return [
        place
        for start, end in zip([*example.starts, len(example.ids)], ends, strict=True)
        for place in range(end - start)
    ]


def epoch_batches(
    examples: Sequence[Example], batch_size: int, seed: int, epoch: int, mix: Mix | None = None
) -> list[list[int]]:
    """Example indices of every batch of one epoch, a function of the arguments alone.

    Examples are shuffled, then sorted by length within windows of 32 batches, so that little is spent on padding; the
    batches are shuffled again. A last short batch is kept.
    """
    rng = random.Random(f"{seed}/{epoch}")
    lengths = lengths_of(examples)
    order = list(range(len(examples))) if mix is None else mix.drawn(seed, epoch)
    rng.shuffle(order)
    window = 32 * batch_size
    batches = []
    for start in range(0, len(order), window):
        near = sorted(order[start : start + window], key=lengths.__getitem__)
        batches += [near[i : i + batch_size] for i in range(0, len(near), batch_size)]
    rng.shuffle(batches)
    return batches


@dataclass(frozen=True)
class Packing:
    """That examples are packed: into rows of ``length`` tokens, by a strategy of ``packed``."""

    length: int
    strategy: str

    def rows(self, examples: Sequence[Example]) -> list[Example]:
        """All examples in rows, as they come."""
        return [laid(row, examples) for row in self.plan(examples, range(len(examples)))]

    def plan(self, examples: Sequence[Example], order: Sequence[int]) -> list[Row]:
        return packed(lengths_of(examples), order, self.length, self.strategy)


def packed_batches(
    examples: Sequence[Example], batch_size: int, seed: int, epoch: int, packing: Packing, mix: Mix | None = None
) -> list[list[Row]]:
    """The rows of every batch of one epoch, a function of the arguments alone.

    Examples are shuffled and packed, and the rows shuffled. A last short batch is kept.
    """
    rng = random.Random(f"{seed}/{epoch}")
    order = list(range(len(examples))) if mix is None else mix.drawn(seed, epoch)
    rng.shuffle(order)
    rows = packing.plan(examples, order)
    rng.shuffle(rows)
    return [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]


def steps(
    examples: Sequence[Example],
    batch_size: int,
    seed: int,
    first: int = 0,
    packing: Packing | None = None,
    mix: Mix | None = None,
) -> Iterator[list[Example]]:
    """The rows of every step from ``first`` on, counted from 0, epoch after epoch without end.

    What a step has is a function of the arguments alone.
    """
    for epoch in itertools.count():
        if packing is None:
            batches = epoch_batches(examples, batch_size, seed, epoch, mix)
            for batch in batches[first:]:
                yield [examples[i] for i in batch]
        else:
            batches = packed_batches(examples, batch_size, seed, epoch, packing, mix)
            for batch in batches[first:]:
                yield [laid(row, examples) for row in batch]
        first = max(0, first - len(batches))


def lengths_of(examples: Sequence[Example]) -> list[int]:
    """Tokens of each; of many without making lists of them."""
    return examples.lengths.tolist() if isinstance(examples, Examples) else [len(example.ids) for example in examples]


def windows(examples: Sequence[Example], length: int, batch_size: int) -> Iterator[dict[str, Tensor]]:
    """All examples end to end, cut into rows of ``length`` tokens: how the paper lays out its scoring samples.

    The rest that does not fill a row comes last, padded.
    """
    stream = itertools.chain.from_iterable(example.ids for example in examples)
    rows = iter(lambda: list(itertools.islice(stream, length)), [])
    while part := list(itertools.islice(rows, batch_size)):
        batch = collate([Example(row, row) for row in part], pad=0)
        yield {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}

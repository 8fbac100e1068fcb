"""What a data set is as tokens: before a training, or alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from esft.data.batches import Packing, collated_length, epoch_batches, lengths_of, packed_batches
from esft.data.examples import IGNORE, Example, Examples
from esft.data.mixing import Mix


@dataclass(frozen=True)
class DataReport:
    """Figures of a data set.

    Attributes:
        records: of the sources.
        left_out: records without an answer within the length.
        truncated: records that reach the length, and are cut there.
        tokens: of the examples.
        supervised: share of the tokens that the loss covers.
        longest: tokens of the longest example.
        fill: share of a batch's positions that hold tokens, and not padding.
        packing: how ``fill`` was reached; None where rows hold one example each.
    """

    records: int
    left_out: int
    truncated: int
    tokens: int
    supervised: float
    longest: int
    fill: float
    packing: Packing | None

    def __str__(self) -> str:
        rows = "padded" if self.packing is None else f"packed into rows of {self.packing.length:,}"
        return (
            f"{self.records:,} records, {self.tokens:,} tokens (longest {self.longest:,}), {self.truncated:,} "
            f"truncated, {self.left_out:,} left out; loss on {self.supervised:.1%} of the tokens; {rows}, batches are "
            f"{self.fill:.1%} full"
        )


def data_report(
    examples: Examples,
    batch_size: int,
    packing: Packing | None = None,
    mix: Mix | None = None,
    together: int | None = None,
    padding_free: bool = False,
) -> DataReport:
    """The figures of examples as they are trained on.

    Args:
        batch_size: rows of a step.
        packing: how rows are made; None where each is an example.
        mix: how the examples of several sources come in an epoch.
        together: rows of a step that go through the model together; None for all.
        padding_free: these are one row then.
    """
    lengths = lengths_of(examples)
    return DataReport(
        examples.records,
        examples.records - len(examples),
        examples.truncated,
        len(examples.ids),
        float(np.mean(examples.counted)),
        max(lengths),
        filled(examples, batch_size, packing, mix, together, padding_free),
        packing,
    )


def filled(
    examples: Sequence[Example],
    batch_size: int,
    packing: Packing | None = None,
    mix: Mix | None = None,
    together: int | None = None,
    padding_free: bool = False,
) -> float:
    """Share of the positions of an epoch's batches that hold tokens; see ``data_report``."""
    lengths = lengths_of(examples)
    if packing is None:
        batches = [[lengths[i] for i in batch] for batch in epoch_batches(examples, batch_size, 0, 0, mix)]
    else:
        rows = packed_batches(examples, batch_size, 0, 0, packing, mix)
        batches = [[sum(piece.end - piece.start for piece in row) for row in batch] for batch in rows]
    together = together or batch_size
    parts = [batch[i : i + together] for batch in batches for i in range(0, len(batch), together)]
    if padding_free:
        parts = [[sum(part)] for part in parts]
    return sum(map(sum, parts)) / sum(len(part) * collated_length(max(part)) for part in parts)


def pieces(tokenizer: PreTrainedTokenizerBase, example: Example) -> list[tuple[str, bool]]:
    """An example's text in parts, each with whether the loss covers it. The first token is never predicted."""
    found: list[tuple[str, bool]] = []
    start = 0
    counts = [i > 0 and label != IGNORE for i, label in enumerate(example.labels)]
    for end in range(1, len(counts) + 1):
        if end == len(counts) or counts[end] != counts[start]:
            found.append((str(tokenizer.decode(example.ids[start:end])), counts[start]))
            start = end
    return found

"""What a data set is as tokens: before a training, or alone; and which records some tokens are of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from transformers import PreTrainedTokenizerBase

from esft.data.batches import Packing, collated_length, epoch_batches, lengths_of, packed_batches
from esft.data.encoding import TOGETHER, Encoder
from esft.data.examples import IGNORE, Example, Examples
from esft.data.mixing import Mix
from esft.data.sources import DataSource


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


def places(
    rows: Sequence[Example], sources: Sequence[DataSource], encoder: Encoder, streaming: bool = False
) -> list[str]:
    """Where each document of some rows was read, as "FILE: line 3", in their order; less what is not found again.

    The sources are read and encoded again: examples carry nothing that says where they are from, and this is asked for
    when a training has gone wrong. Of records with the same tokens the first is named.

    Args:
        sources: and ``encoder``: that the rows were made with.
    """
    wanted = [document for row in rows for document in _documents(row)]
    found: dict[bytes, str] = {}
    for place, tokens in _encoded(sources, encoder, streaming):
        for document in wanted:
            # Of a document that was cut where a row was full, each part is somewhere in its record.
            if document not in found and _within(document, tokens):
                found[document] = place
        if len(found) == len(set(wanted)):
            break
    return list(dict.fromkeys(found[document] for document in wanted if document in found))


def _documents(row: Example) -> Iterator[bytes]:
    for start, end in zip(row.starts, (*row.starts[1:], len(row.ids)), strict=True):
        yield _bytes(row.ids[start:end])


def _encoded(sources: Sequence[DataSource], encoder: Encoder, streaming: bool) -> Iterator[tuple[str, bytes]]:
    for source in sources:
        records, first = source.records(streaming), 1
        while part := list(islice(records, TOGETHER)):
            for record, (example, _) in zip(part, encoder.encode_some(part, first, source.name), strict=True):
                yield f"{source.name}: {record.place}", _bytes(example.ids)
            first += len(part)


def _bytes(ids: Sequence[int]) -> bytes:
    return np.array(ids, np.int32).tobytes()


def _within(part: bytes, whole: bytes) -> bool:
    """Whether the numbers of one are among those of the other, in a row."""
    at = whole.find(part)
    while at % 4 and at >= 0:
        at = whole.find(part, at + 1)
    return at >= 0

"""The data of a training: from what it is called with, and its settings, to batches."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from esft.checkpoint.source import Reach
from esft.data.batches import Packing, steps
from esft.data.cache import encoded
from esft.data.encoding import Encoder
from esft.data.examples import Example, Examples
from esft.data.mixing import Mix, end_to_end, mixed_weights, weights_of
from esft.data.report import DataReport, data_report, places
from esft.data.sources import DataSource, read_records
from esft.data.streaming import streamed
from esft.errors import InputError
from esft.evaluation.scores import EvalSet
from esft.runs.config import TrainConfig
from esft.storage.files import value_digest
from esft.storage.reading import shown

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")

Data = str | Path | Sequence[str | Path]


def sources_of(data: Data) -> list[DataSource]:
    """One source or several. Raises InputError for what is none, and where only some have a weight."""
    sources = [DataSource.of(each) for each in ([data] if isinstance(data, str | Path) else data)]
    weights_of(sources)
    return sources


def held_out_sources(data: str | Path | Mapping[str, str | Path] | None) -> dict[str, DataSource]:
    """Evaluation data by name, the empty one where there is one without.

    Raises InputError for a name that is none, and for data with a weight.
    """
    named = {} if data is None else {"": data} if isinstance(data, str | Path) else data
    for name in named:
        if not (_NAME.fullmatch(name) or (not name and len(named) == 1)):
            raise InputError(f"{shown(name)} is no name of evaluation data: letters, digits, - and _ make one")
    return {name: DataSource.measured(source) for name, source in named.items()}


@dataclass(frozen=True)
class RunData:
    """What a run is trained on.

    Attributes:
        sources: of the records.
        tokenizer: the model's.
        reach: the model's.
        config: of the run.
        mixed: a source of general data that is mixed in, its weight the share of the examples that come of it.
        mix: of the sources, by weight; None where each example comes once an epoch.
        examples: of all sources; None where they are streamed.
    """

    sources: Sequence[DataSource]
    tokenizer: PreTrainedTokenizerBase
    reach: Reach
    config: TrainConfig
    mixed: DataSource | None = None
    mix: Mix | None = None
    examples: Examples | None = None

    def read(self, progress: bool = False) -> RunData:
        """With all sources read and encoded; of those that are streamed, the first records for a trial.

        Raises InputError for whatever cannot be used in them.
        """
        weights, encoder = weights_of(self.sources), self._encoder(self.config.packing)
        if self.config.streaming:
            if self.mixed is not None:
                raise InputError(f"{self.mixed}: nothing is mixed into data that is streamed")
            next(streamed(self.sources, encoder, 1, self.config.seed))
            return self
        parts = [encoded(source, encoder, self.config.dataset_num_proc, progress) for source in self._all_sources]
        sizes = [len(part) for part in parts]
        if self.mixed is not None and self.mixed.weight is not None:
            weights = mixed_weights(sizes, weights, self.mixed.weight)
        mix = Mix(sizes, weights) if weights and len(parts) > 1 else None
        return replace(self, mix=mix, examples=end_to_end(parts, self.mixed is not None))

    def eval_sets(self, sources: Mapping[str, DataSource], progress: bool = False) -> list[EvalSet]:
        """What to evaluate on, of sources by name. Raises InputError as ``read`` and ``EvalSet.check`` do."""
        packs = self.config.packing if self.config.eval_packing is None else self.config.eval_packing
        sets = []
        for name, source in sources.items():
            examples = encoded(source, self._encoder(packs), self.config.dataset_num_proc, progress)
            records = read_records(source) if set(self.config.scores) - {"loss"} else []
            rows = self._packing.rows(examples) if packs else examples
            sets.append(EvalSet(name, source.name, rows, records))
            sets[-1].check(self.tokenizer, self.reach, self.config.scores)
        return sets

    def batches(self, first: int) -> Iterator[list[Example]]:
        """The rows of every step from ``first`` on, counted from 0, to the last."""
        config, packing = self.config, self.packing
        if self.examples is None:
            encoder = self._encoder(config.packing)
            rows = streamed(self.sources, encoder, config.batch_size, config.seed, first, packing)
        else:
            rows = steps(self.examples, config.batch_size, config.seed, first, packing, self.mix)
        return islice(rows, config.steps - first)

    def places(self, rows: Sequence[Example]) -> list[str]:
        """Where the records of some rows were read; see ``report.places``."""
        return places(rows, self._all_sources, self._encoder(self.config.packing), self.config.streaming)

    def report(self) -> DataReport | None:
        """Figures of the examples as they are trained on; None of a stream."""
        if self.examples is None:
            return None
        config = self.config
        return data_report(
            self.examples, config.batch_size, self.packing, self.mix, config.micro_batch_size, config.padding_free
        )

    def together(self) -> tuple[int, int]:
        """How many rows go through the model together in one process, and how many tokens at the most."""
        config = self.config
        rows = config.micro_batch_size or config.batch_size
        if self.examples is None or config.packing:
            return rows, rows * self.reach.length(config.max_length)
        longest = sorted(self.examples.lengths.tolist(), reverse=True)[:rows]
        return rows, sum(longest) if config.padding_free else rows * longest[0]

    @property
    def packing(self) -> Packing | None:
        """How rows are made; None where each is an example."""
        return self._packing if self.config.packing else None

    @property
    def _packing(self) -> Packing:
        return Packing(self.reach.length(self.config.max_length), self.config.packing_strategy)

    def _encoder(self, packs: bool) -> Encoder:
        config, length = self.config, self.reach.length(self.config.max_length)
        # What is cut where a row is full is not cut before.
        most = None if packs and config.packing_strategy == "wrapped" else length
        learnt = {name: getattr(config, name) for name in ("assistant_only_loss", "completion_only_loss")}
        return Encoder(self.tokenizer, most, self.reach.vocabulary, **learnt)

    @property
    def _all_sources(self) -> list[DataSource]:
        return [*self.sources, *([] if self.mixed is None else [self.mixed])]

    @property
    def name(self) -> str:
        mixed = "" if self.mixed is None else f", mixed with {self.mixed}"
        return ", ".join(map(str, self.sources)) + mixed

    def encoding(self) -> str | None:
        """A digest of what makes tokens of the records; see ``Encoder.digest``."""
        return self._encoder(self.config.packing).digest()

    def digest(self) -> str:
        """Of the content: of a single source its own."""
        digests = [source.digest(self.config.streaming) for source in self._all_sources]
        if len(digests) == 1:
            return digests[0]
        mixed = [] if self.mixed is None else [{"mixed": self.mixed.weight}]
        return value_digest([digests, weights_of(self.sources), *mixed])

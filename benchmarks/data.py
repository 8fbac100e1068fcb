"""Data: seconds to encode records, the first time and from the cache, and what of the batches is padding."""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from esft.checkpoint.load import load_tokenizer
from esft.data import cache
from esft.data.batches import Packing
from esft.data.cache import encoded
from esft.data.encoding import Encoder, encode_all
from esft.data.examples import Example, Examples
from esft.data.records import Messages
from esft.data.report import filled
from esft.data.sources import DataSource, read_records

LONG = (20, 4000)  # tokens of the shortest and the longest record of the drawn set, and what its rows have
ROW, BATCH = 4096, 8
WORDS = (
    "the light in kitchen and hall turn on off set to a quarter of its brightness please when door opens after sunset "
    "otherwise leave everything as it was until I say so again tomorrow morning at half past six degrees"
).split()


def _drawn(count: int, words: int, seed: int = 0) -> Iterator[dict]:
    rng = random.Random(seed)
    for _ in range(count):
        ask, reply = (" ".join(rng.choices(WORDS, k=rng.randint(words // 2, words))) for _ in range(2))
        yield {"messages": [{"role": "user", "content": ask}, {"role": "assistant", "content": reply}]}


def encoding(model: str, count: int, words: int, processes: int | None) -> dict:
    """Seconds for records of two turns of ``words / 2`` to ``words`` words: the first time, from the cache, and prefix
    by prefix, of which a twentieth is measured."""
    logging.set_verbosity_error()
    encoder = Encoder(load_tokenizer(model), 4096)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "d.jsonl"
        path.write_text("".join(json.dumps(each) + "\n" for each in _drawn(count, words)), encoding="utf-8")
        seconds: list[float] = []
        examples = Examples.of([], 0, 0)
        with mock.patch.object(cache, "folder", lambda: Path(folder)):
            for _ in range(2):
                begun = time.monotonic()
                examples = encoded(DataSource.of(path), encoder, processes)
                seconds.append(time.monotonic() - begun)
    begun = time.monotonic()
    sample = list(_drawn(max(1, count // 20), words))
    for each in sample:
        _prefix_by_prefix(encoder.tokenizer, each["messages"])
    return {
        "records": count,
        "tokens a record": round(len(examples.ids) / len(examples), 1),
        "processes": processes or 1,
        "seconds": seconds[0],
        "again": seconds[1],
        "prefix by prefix": (time.monotonic() - begun) / len(sample) * count,
    }


def _prefix_by_prefix(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> None:
    """Render and tokenize a record turn by turn, each time from its beginning."""
    for upto, prompt in ((1, False), (1, True), (2, False)):
        text: Any = tokenizer.apply_chat_template(messages[:upto], tokenize=False, add_generation_prompt=prompt)
        tokenizer(text, add_special_tokens=False)


def padding(model: str, data: Path | None, length: int, batch_size: int) -> list[dict]:
    """Share of the batches' positions that is padding: records a row each, by like length, and packed."""
    rng = random.Random(0)
    drawn = (Example([0] * n, [0] * n) for n in (rng.randint(*LONG) for _ in range(2000)))
    sets: dict[str, tuple[Examples, int, int]] = {}
    if data is not None:
        records = read_records(data)
        sets[str(data)] = encode_all(Encoder(load_tokenizer(model), length), records, str(data)), length, batch_size
    sets["{:,} to {:,} tokens, drawn".format(*LONG)] = Examples.of(drawn, 2000, 0), ROW, BATCH
    return [
        {
            "data": name,
            "row": row,
            "batch": batch,
            "padding": 1 - filled(examples, batch),
            "bfd": 1 - filled(examples, batch, Packing(row, "bfd")),
            "wrapped": 1 - filled(examples, batch, Packing(row, "wrapped")),
        }
        for name, (examples, row, batch) in sets.items()
    ]

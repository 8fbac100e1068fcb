"""Token streams for pretraining: text documents end to end, instruction records packed whole."""

from __future__ import annotations

import json
import os
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

ENCODE_BATCH = 4096
IGNORE = -100


@dataclass(frozen=True)
class Tokens:
    """Token ids and whether each is a training target, as flat arrays with document boundaries."""

    ids: np.ndarray  # uint16 [n]
    target: np.ndarray  # bool [n]
    ends: np.ndarray  # int64 [documents]


def _collect(pieces: list[tuple[list[int], list[bool]]]) -> Tokens:
    ids = np.fromiter((i for p in pieces for i in p[0]), dtype=np.uint16)
    target = np.fromiter((t for p in pieces for t in p[1]), dtype=bool)
    return Tokens(ids, target, np.cumsum([len(p[0]) for p in pieces], dtype=np.int64))


def encode_texts(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tokens:
    """<|bos|> text <|end|> per document, every token but the first a target."""
    bos, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    pieces = []
    for start in range(0, len(texts), ENCODE_BATCH):
        for ids in tokenizer(texts[start : start + ENCODE_BATCH], add_special_tokens=False)["input_ids"]:
            pieces.append(([bos, *ids, end], [False] + [True] * (len(ids) + 1)))
    return _collect(pieces)


def encode_chats(tokenizer: PreTrainedTokenizerFast, chats: list[list[dict]]) -> Tokens:
    """The chat template, with the assistant turns as targets."""
    user, assistant = (tokenizer.convert_tokens_to_ids(f"<|{role}|>") for role in ("user", "assistant"))
    bos, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    turns = [m["content"] for chat in chats for m in chat]
    encoded: list[list[int]] = []
    for start in range(0, len(turns), ENCODE_BATCH):
        encoded += tokenizer(turns[start : start + ENCODE_BATCH], add_special_tokens=False)["input_ids"]
    pieces, position = [], 0
    for chat in chats:
        ids, target = [bos], [False]
        for message in chat:
            own = message["role"] == "assistant"
            content = [*encoded[position], end]
            position += 1
            ids += [assistant if own else user, *content]
            target += [False] + [own] * len(content)
        pieces.append((ids, target))
    return _collect(pieces)


def read_texts(work: Path, split: str) -> dict[str, list[str]]:
    """Documents by domain, from DIR/text/<domain>.<split>.jsonl."""
    return {
        path.name.split(".")[0]: [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]
        for path in sorted((work / "text").glob(f"*.{split}.jsonl"))
    }


def read_chats(path: Path) -> list[list[dict]]:
    return [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").splitlines()]


def cached(path: Path, sources: list[Path], make) -> Tokens:
    """Tokens from a file, made once and again when a source is newer.

    Several processes may do so at once: the file appears whole.
    """
    if not path.exists() or path.stat().st_mtime < max(source.stat().st_mtime for source in sources):
        tokens = make()
        part = path.with_name(f"{path.stem}.{os.getpid()}.npz")
        np.savez(part, ids=tokens.ids, target=tokens.target, ends=tokens.ends)
        os.replace(part, path)
    with np.load(path, allow_pickle=False) as arrays:
        return Tokens(arrays["ids"], arrays["target"], arrays["ends"])


def shuffled(tokens: Tokens, seed: int) -> Tokens:
    """The same documents in another order."""
    starts = np.concatenate([[0], tokens.ends[:-1]])
    order = np.random.default_rng(seed).permutation(len(tokens.ends))
    index = np.concatenate([np.arange(starts[i], tokens.ends[i]) for i in order])
    return Tokens(tokens.ids[index], tokens.target[index], np.cumsum((tokens.ends - starts)[order]))


def text_rows(tokens: Tokens, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut the stream into rows of ``length``, [rows, length] ids and targets."""
    rows = len(tokens.ids) // length
    return tokens.ids[: rows * length].reshape(rows, length), tokens.target[: rows * length].reshape(rows, length)


def chat_rows(tokens: Tokens, length: int, pad: int) -> tuple[np.ndarray, np.ndarray]:
    """Records laid whole into rows of ``length``: every row starts with a record's first token. Longer ones drop."""
    rows_ids, rows_target = [], []
    ids, target, used = np.full(length, pad, np.uint16), np.zeros(length, bool), 0
    start = 0
    for end in tokens.ends:
        size = end - start
        if size <= length:
            if used + size > length:
                rows_ids.append(ids)
                rows_target.append(target)
                ids, target, used = np.full(length, pad, np.uint16), np.zeros(length, bool), 0
            ids[used : used + size] = tokens.ids[start:end]
            target[used : used + size] = tokens.target[start:end]
            used += size
        start = end
    return np.stack(rows_ids), np.stack(rows_target)


class Rows:
    """Endless rows in a fixed order that depends on the seed alone; row i is the same however often it is asked."""

    def __init__(self, ids: np.ndarray, target: np.ndarray, seed: int):
        self.ids, self.target, self.seed = ids, target, seed

    def take(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        index = [self._index(first + i) for i in range(count)]
        return self.ids[index], self.target[index]

    def _index(self, i: int) -> int:
        epoch, offset = divmod(i, len(self.ids))
        return (offset + random.Random(self.seed + epoch).randrange(len(self.ids))) % len(self.ids)


def batch(sources: list[tuple[Rows, int]], step: int) -> tuple[Tensor, Tensor]:
    """ids and labels [rows, length] of one step; ``sources`` gives each stream and its rows per step."""
    parts = [rows.take(step * count, count) for rows, count in sources if count]
    ids = torch.from_numpy(np.concatenate([p[0] for p in parts]).astype(np.int64))
    target = torch.from_numpy(np.concatenate([p[1] for p in parts]))
    return ids, ids.masked_fill(~target, IGNORE)

"""Chat records: reading, encoding with the model's chat template, batching."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from esft.bounds import memory_within, within
from esft.errors import InputError, first_line
from esft.storage.limits import ENCODING, RENDERED, TEXT
from esft.storage.reading import parse_json, read_text

logger = logging.getLogger("esft")

IGNORE = -100  # label of a position without loss
ROLES = ("system", "user", "assistant")

_WANTED = 'a record is a line of its own: {"messages": [{"role": "user", "content": ...}, ...]}'

Messages = list[dict[str, str]]


def read_records(path: str | Path) -> list[Messages]:
    """The chat records of a JSONL file, one ``{"messages": [...]}`` a line; blank lines are passed over.

    Raises InputError naming the file and line for anything that is not such a record with an assistant turn, and for a
    file without records.
    """
    # Not splitlines(): it would also cut at separators that JSON strings may hold.
    text = read_text(path, "utf-8-sig")
    try:
        lines = enumerate(text.split("\n"), 1)
        records = [_parse(line, f"{path}: line {number}") for number, line in lines if line.strip()]
    except InputError as error:
        if _is_json(text):
            raise InputError(f"{path}: one JSON value over several lines; {_WANTED}") from error
        raise
    if not records:
        raise InputError(f"{path}: holds no records")
    return records


def _is_json(text: str) -> bool:
    """Whether a text of several lines is one JSON value."""
    if "\n" not in text.strip() or text.lstrip()[:1] not in ("{", "["):
        return False
    try:
        parse_json(text, "")
    except InputError:
        return False
    return True


def _parse(line: str, where: str) -> Messages:
    try:
        record = parse_json(line, where, lines=False)
    except InputError as error:
        raise InputError(f"{error}; {_WANTED}") from error
    messages = record.get("messages") if isinstance(record, dict) else None
    if not isinstance(messages, list) or not messages:
        raise InputError(f'{where}: no "messages" list; {_WANTED}')
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise InputError(f"{where}: a message's role must be one of {', '.join(ROLES)}")
        if not isinstance(message.get("content"), str):
            raise InputError(f"{where}: a message's content must be text")
        if any("\ud800" <= character <= "\udfff" for character in message["content"]):
            raise InputError(f"{where}: a message's content holds half of a surrogate pair")
    if not any(message["role"] == "assistant" for message in messages):
        raise InputError(f"{where}: no assistant turn")
    if messages[0]["role"] == "assistant":
        raise InputError(f"{where}: begins with an assistant turn")
    return messages


@dataclass(frozen=True)
class Example:
    """Token ids of one record and its labels; ``labels[i]`` is ``ids[i]`` inside assistant turns, else IGNORE."""

    ids: list[int]
    labels: list[int]


def encode(tokenizer: PreTrainedTokenizerBase, messages: Messages, max_length: int) -> Example:
    """Apply the chat template; the loss covers assistant turns, their end marker included.

    Turn borders are found by rendering ever longer prefixes of the record, so any template works whose rendering of a
    prefix is a prefix of the whole. Raises InputError where it is not, and where template and tokenizer come to no end.
    Longer records are cut at ``max_length`` tokens.
    """
    ids: list[int] = []
    labels: list[int] = []
    with within(ENCODING):
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                # Tokens up to the assistant's header belong to the prompt.
                head = render(tokenizer, messages[:i], add_generation_prompt=True)
                _extend(ids, labels, head, learn=False)
            _extend(ids, labels, render(tokenizer, messages[: i + 1]), learn=message["role"] == "assistant")
    return Example(ids[:max_length], labels[:max_length])


def render(tokenizer: PreTrainedTokenizerBase, messages: Messages, add_generation_prompt: bool = False) -> list[int]:
    """Raises InputError for whatever a template or a tokenizer, both read from files, makes of it."""
    try:
        with memory_within(RENDERED):
            text: Any = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        if len(text) > TEXT:
            raise InputError(f"the chat template makes {len(text):,} characters of it; at most {TEXT:,} are read")
        return tokenizer(text, add_special_tokens=False)["input_ids"]  # pyright: ignore[reportReturnType]
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"the chat template cannot render it ({first_line(error)})") from error


def encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> list[int]:
    """Token ids of a conversation up to where the answer begins. Raises InputError where there are none."""
    with within(ENCODING):
        ids = render(tokenizer, messages, add_generation_prompt=True)
    if not ids:
        raise InputError("the chat template renders nothing of it")
    return ids


def _extend(ids: list[int], labels: list[int], longer: list[int], learn: bool) -> None:
    if longer[: len(ids)] != ids:
        raise InputError("the chat template renders a prefix of a conversation differently from the whole")
    new = longer[len(ids) :]
    ids += new
    labels += new if learn else [IGNORE] * len(new)


def encode_all(
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Messages],
    max_length: int,
    source: str | Path,
    vocabulary: int | None = None,
    progress: bool = False,
) -> list[Example]:
    """Encode records; those whose answer lies beyond ``max_length`` are left out, with a warning.

    Args:
        source: the records' file, for messages.
        vocabulary: how many tokens the model has; None where that is not known.
        progress: show a bar, in records, on a terminal.

    Raises InputError when none is left, and naming the record that the chat template cannot render, or that has a token
    which the model does not have.
    """
    examples, cut = [], 0
    for number, record in enumerate(tqdm(records, "encode", disable=None if progress else True, unit="record"), 1):
        try:
            example = encode(tokenizer, record, max_length)
        except InputError as error:
            raise InputError(f"{source}: record {number}: {error}") from error
        if vocabulary is not None and example.ids and (largest := max(example.ids)) >= vocabulary:
            raise InputError(
                f"{source}: record {number}: the tokenizer gives token {largest}; the model has {vocabulary} tokens"
            )
        cut += len(example.ids) == max_length
        if any(label != IGNORE for label in example.labels[1:]):  # nothing comes before the first
            examples.append(example)
    if not examples and not cut:
        raise InputError(f"{source}: the chat template renders no assistant turn of any record")
    if not examples:
        raise InputError(f"{source}: no record has its answer within {max_length} tokens")
    if cut:
        left_out = len(records) - len(examples)
        logger.warning("%s: %d records reach %d tokens and are cut; %d left out", source, cut, max_length, left_out)
    return examples


def collate(examples: Sequence[Example], pad: int, left: bool = False) -> dict[str, Tensor]:
    """Pad to the longest: input_ids, attention_mask and labels, int64 [B, L]. Padding on the right unless ``left``.

    L is a multiple of 8: matrix units like that, and libraries that prepare code per shape meet few shapes.
    """
    length = -(-max(len(e.ids) for e in examples) // 8) * 8

    def padded(values: list[int], fill: int) -> list[int]:
        gap = [fill] * (length - len(values))
        return gap + values if left else values + gap

    return {
        "input_ids": torch.tensor([padded(e.ids, pad) for e in examples]),
        "attention_mask": torch.tensor([padded([1] * len(e.ids), 0) for e in examples]),
        "labels": torch.tensor([padded(e.labels, IGNORE) for e in examples]),
    }


def epoch_batches(examples: Sequence[Example], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Example indices of every batch of one epoch, a function of the arguments alone.

    Examples are shuffled, then sorted by length within windows of 32 batches, so that little is spent on padding; the
    batches are shuffled again. A last short batch is kept.
    """
    rng = random.Random(f"{seed}/{epoch}")
    order = list(range(len(examples)))
    rng.shuffle(order)
    window = 32 * batch_size
    batches = []
    for start in range(0, len(order), window):
        near = sorted(order[start : start + window], key=lambda i: len(examples[i].ids))
        batches += [near[i : i + batch_size] for i in range(0, len(near), batch_size)]
    rng.shuffle(batches)
    return batches


def windows(examples: Sequence[Example], length: int, batch_size: int) -> Iterator[dict[str, Tensor]]:
    """All examples end to end, cut into rows of ``length`` tokens: how the paper lays out its scoring samples.

    The rest that does not fill a row comes last, padded.
    """
    stream = [token for example in examples for token in example.ids]
    rows = [Example(row := stream[i : i + length], row) for i in range(0, len(stream), length)]
    for i in range(0, len(rows), batch_size):
        batch = collate(rows[i : i + batch_size], pad=0)
        yield {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}

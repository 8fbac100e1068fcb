"""Records to tokens."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from typing import Any

import tokenizers
import transformers
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from esft.bounds import memory_within, within
from esft.data.examples import IGNORE, Example, Examples
from esft.data.records import Record
from esft.data.rendering import Rendered, plain_text, render, rendered
from esft.errors import InputError, check_is_error, first_line
from esft.parallel.join import current
from esft.storage.files import value_digest
from esft.storage.limits import ENCODING, RENDERED

logger = logging.getLogger("esft")

TOGETHER = 256  # records whose texts go through the tokenizer in one call


@dataclass(frozen=True)
class Encoder:
    """How records become tokens.

    Attributes:
        tokenizer: the model's.
        max_length: tokens of a record; longer ones are cut. None for all of them.
        vocabulary: how many tokens the model has; None where that is not known.
        assistant_only_loss: see ``rendered``, as for ``completion_only_loss``.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int | None
    vocabulary: int | None = None
    assistant_only_loss: bool = True
    completion_only_loss: bool = True

    def encode(self, record: Record) -> Example:
        """Raises InputError for what template, tokenizer and model do not make tokens of."""
        return self.encode_some([record])[0][0]

    def encode_some(self, records: Sequence[Record], first: int = 1, source: str = "") -> list[tuple[Example, bool]]:
        """Each record's example, and whether it had ``max_length`` tokens or more.

        Args:
            first: the number of the first record, and ``source`` where all are from, for messages.

        Raises InputError naming the first record that cannot be encoded, also where its template comes to no end.
        """
        wheres = [record.place or f"record {number}" for number, record in enumerate(records, first)]
        wheres = [f"{source}: {where}: " if source else "" for where in wheres]
        texts: list[Rendered] = []
        for record, where in zip(records, wheres, strict=True):
            with _at(where), within(ENCODING), memory_within(RENDERED):
                texts.append(rendered(self.tokenizer, record, self.assistant_only_loss, self.completion_only_loss))
        tokens: dict[int, tuple[list[int], Any]] = {}
        for plain in (False, True):
            places = [i for i, each in enumerate(texts) if each.plain == plain]
            try:
                tokens |= zip(places, self._tokenized([texts[i].text for i in places], plain), strict=True)
            except InputError:  # of one of them
                for i in places:
                    with _at(wheres[i]):
                        tokens[i] = self._tokenized([texts[i].text], plain)[0]
        found = []
        for i, (text, where) in enumerate(zip(texts, wheres, strict=True)):
            with _at(where):
                found.append(self._example(text, *tokens[i]))
        return found

    def _tokenized(self, texts: list[str], plain: bool) -> list[tuple[list[int], Any]]:
        """Token ids of each text, and what tells which characters each token has; None where the tokenizer does not."""
        if not texts:
            return []
        try:
            batch = self.tokenizer(
                texts, add_special_tokens=plain, return_attention_mask=False, return_token_type_ids=False
            )
        except BaseException as error:  # tokenizers raise errors of many kinds
            check_is_error(error)
            raise InputError(f"the tokenizer cannot encode it ({first_line(error)})") from error
        ids: Any = batch["input_ids"]
        return list(zip(ids, batch.encodings or [None] * len(texts), strict=True))

    def _example(self, text: Rendered, ids: list[int], encoding: Any) -> tuple[Example, bool]:
        if self.vocabulary is not None and ids and (largest := max(ids)) >= self.vocabulary:
            raise InputError(f"the tokenizer gives token {largest}; the model has {self.vocabulary} tokens")
        labels = [IGNORE] * len(ids)
        for start, end, counts in text.spans:
            part = slice(*(self._tokens_before(place, text, ids, encoding) for place in (start, end)))
            labels[part] = ids[part] if counts else [IGNORE] * len(ids[part])
        most = self.max_length
        return Example(ids[:most], labels[:most]), most is not None and len(ids) >= most

    def _tokens_before(self, place: int, text: Rendered, ids: list[int], encoding: Any) -> int:
        """How many tokens come before a character. Raises InputError where it is inside a token."""
        if place in (0, len(text.text)):
            return 0 if place == 0 else len(ids)
        token = None if encoding is None else encoding.char_to_token(place)
        if encoding is not None and token is not None and encoding.token_to_chars(token)[0] == place:
            return token
        if encoding is not None and token is None:  # of a space that tokens have, and leave out of where they begin
            token = next((i for i, (_, end) in enumerate(encoding.offsets) if end > place), len(ids))
            if token == len(ids) or encoding.offsets[token][0] >= place:
                return token
        # Nothing tells, or a token has taken spaces before this place with it, as special tokens do.
        before = self._tokenized([text.text[:place]], text.plain)[0][0]
        if ids[: len(before)] != before:
            raise InputError("a token stands across the border between what is learnt and what is not")
        return len(before)

    def digest(self) -> str | None:
        """Of all that decides on the tokens; None where a tokenizer cannot be told from another."""
        backend, template = getattr(self.tokenizer, "backend_tokenizer", None), self.tokenizer.chat_template
        if backend is None:
            return None
        parts = [
            transformers.__version__, tokenizers.__version__, type(self.tokenizer).__name__, backend.to_str(), template,
            date.today().isoformat() if "strftime_now" in str(template) else "",  # the template renders the date
            self.tokenizer.special_tokens_map, self.tokenizer.split_special_tokens,
            self.max_length, self.vocabulary, self.assistant_only_loss, self.completion_only_loss,
        ]  # fmt: skip
        return value_digest(parts)


def tokenizer_digests(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Of a tokenizer's content (of one in plain Python its vocabulary) and of its chat template, by these names."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        content = tokenizer.get_vocab()
    else:
        content = json.loads(backend.to_str()) | {"padding": None, "truncation": None}  # these two are of the last call
    return {
        "tokenizer": value_digest([content, tokenizer.special_tokens_map, tokenizer.split_special_tokens]),
        "chat template": value_digest(tokenizer.chat_template),
    }


@contextmanager
def _at(where: str) -> Iterator[None]:
    """Errors inside say where."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{where}{error}") from error


def encode_all(
    encoder: Encoder, records: Sequence[Record], source: str, processes: int | None = None, progress: bool = False
) -> Examples:
    """Encode records; those without a token that counts within the length are left out.

    Args:
        source: where the records are from, for messages.
        processes: that share the work; None for this one, whose tokenizer uses all cores for its part of it.
        progress: show a bar, in records, on a terminal.

    Raises InputError naming the record that cannot be encoded, and where none is left; see ``check``.
    """
    starts = range(0, len(records), TOGETHER)
    parts = ((records[start : start + TOGETHER], start + 1, source) for start in starts)
    kept: list[Example] = []
    truncated = 0
    with (
        tqdm(total=len(records), desc="encode", disable=None if progress else True, unit="record") as bar,
        _mapped(encoder, processes) as mapped,
    ):
        for found in mapped(parts):
            bar.update(len(found))
            current().progress()
            kept += [example for example, _ in found if example.targets]
            truncated += sum(cut for _, cut in found)
    return check(Examples.of(kept, len(records), truncated), source, encoder.max_length)


@contextmanager
def _mapped(encoder: Encoder, processes: int | None) -> Iterator[Any]:
    """What maps ``encode_some`` over its arguments, in order."""
    if processes is None or processes == 1:
        yield lambda parts: (encoder.encode_some(*part) for part in parts)
        return
    with ProcessPoolExecutor(processes, initializer=_begin, initargs=(encoder,)) as pool:
        try:
            yield lambda parts: pool.map(_encode_some, parts)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


_encoder: Encoder  # of a process that encodes for another


def _begin(encoder: Encoder) -> None:
    global _encoder
    _encoder = encoder


def _encode_some(part: tuple[Sequence[Record], int, str]) -> list[tuple[Example, bool]]:
    return _encoder.encode_some(*part)


def check(examples: Examples, source: str, max_length: int | None) -> Examples:
    """Examples of which there are some, with a warning where records were cut. Raises InputError without any."""
    if not examples and not examples.truncated:
        raise InputError(f"{source}: the chat template renders no assistant turn of any record")
    if not examples:
        raise InputError(f"{source}: no record has its answer within {max_length} tokens")
    if cut := examples.truncated:
        left_out = examples.records - len(examples)
        logger.warning("%s: %d records reach %d tokens and are cut; %d left out", source, cut, max_length, left_out)
    return examples


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Record) -> list[int]:
    """Token ids of a conversation up to where the answer begins, or of a text.

    Raises InputError where there are none.
    """
    with within(ENCODING), memory_within(RENDERED):
        text = render(tokenizer, prompt, add_generation_prompt=True) if prompt.messages else plain_text(prompt)
    try:
        ids: Any = tokenizer(text, add_special_tokens=not prompt.messages)["input_ids"]
    except BaseException as error:  # tokenizers raise errors of many kinds
        check_is_error(error)
        raise InputError(f"the tokenizer cannot encode it ({first_line(error)})") from error
    if not ids:
        raise InputError("the chat template renders nothing of it")
    return ids

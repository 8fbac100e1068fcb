"""What a model is expected to answer: the last turn of a record, as the chat template teaches it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from esft.data.records import Record
from esft.data.rendering import render
from esft.errors import InputError

_PROBE = "q7z0"  # an answer that shows what a template puts around any


@dataclass(frozen=True)
class Expected:
    """The expected answer to a prompt.

    Attributes:
        prompt: the record before the answer.
        text: the answer; of a turn that calls tools, all that the template makes of it.
        lead: what a template puts before every answer, and so a model too: an empty thought, a channel.
        tokens: of lead and text.
    """

    prompt: Record
    text: str
    lead: str
    tokens: int

    def without_lead(self, given: str) -> str:
        """A model's answer, compared with ``text``."""
        lead = self.lead.strip()
        return given.strip().removeprefix(lead).lstrip() if lead else given


def split_prompt(record: Record) -> tuple[Record, str]:
    """A record before its last assistant turn, or of a text its prompt; and the answer.

    Raises InputError for a text that is all answer.
    """
    if not record.messages:
        if not record.prompt:
            raise InputError(
                f"{record.place or 'a record'}: is a text without a prompt, which has no answer to compare"
            )
        return replace(record, text=record.text[: record.prompt]), record.text[record.prompt :]
    last = _last(record)
    return replace(record, messages=record.messages[:last]), record.messages[last].get("content", "")


def expected_answer(tokenizer: PreTrainedTokenizerBase, record: Record, ends: Collection[int]) -> Expected:
    """What is expected of a model that has learned the record.

    Args:
        ends: tokens that end an answer.

    Raises InputError as ``split_prompt`` and ``render`` do.
    """
    prompt, text = split_prompt(record)
    if not record.messages:
        return Expected(prompt, text, "", len(_ids(tokenizer, text)))
    given = render(tokenizer, prompt, add_generation_prompt=True) if prompt.messages else ""
    turn = _turn(tokenizer, record, given)
    if record.messages[_last(record)].get("tool_calls"):
        ids = _ids(tokenizer, turn)
        ids = ids[: next((n for n, token in enumerate(ids) if token in ends), len(ids))]
        return Expected(prompt, tokenizer.decode(ids, skip_special_tokens=True).strip(), "", len(ids))
    before, found, _ = _turn(tokenizer, _with_answer(record, _PROBE), given).partition(_PROBE)
    lead = before if found and turn.startswith(before) else ""
    return Expected(
        prompt,
        text,
        tokenizer.decode(_ids(tokenizer, lead), skip_special_tokens=True),
        len(_ids(tokenizer, lead + text)),
    )


def _turn(tokenizer: PreTrainedTokenizerBase, record: Record, given: str) -> str:
    """What the template makes of the last turn, after what a model is given; empty where that is no part of it."""
    whole = render(tokenizer, record, record.messages[: _last(record) + 1])
    return whole[len(given) :] if whole.startswith(given) else ""


def _with_answer(record: Record, text: str) -> Record:
    last = _last(record)
    return replace(record, messages=[*record.messages[:last], record.messages[last] | {"content": text}])


def _last(record: Record) -> int:
    return max(i for i, message in enumerate(record.messages) if message["role"] == "assistant")


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]  # pyright: ignore[reportReturnType]

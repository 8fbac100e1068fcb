"""The text of a record, by the model's chat template, and which of its characters the loss covers."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from esft.data.records import Messages, Record, counts
from esft.errors import InputError, first_line
from esft.storage.limits import TEXT
from esft.transformers_internals import render_with_marks

_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Rendered:
    """The text of a record.

    Attributes:
        text: what goes to the tokenizer.
        spans: characters from and to, and whether they count; of those that overlap the last one holds. What is in none
            does not count.
        plain: it is no conversation: the tokenizer adds its special tokens.
    """

    text: str
    spans: list[tuple[int, int, bool]]
    plain: bool


def rendered(
    tokenizer: PreTrainedTokenizerBase, record: Record, assistant_only: bool = True, completion_only: bool = True
) -> Rendered:
    """The text of a record and what of it counts.

    Args:
        assistant_only: of a conversation the assistant turns count, their end marker included; else all but those of
            weight 0.
        completion_only: nothing of a record's prompt counts.

    Where the template marks what the assistant generates (``{% generation %}``), these marks are the turns. Else a turn
    is what the conversation up to it renders to beyond the one before it, the header of the answer included in that;
    so any template works whose rendering of a prefix is a prefix of the whole. Raises InputError where it is not.
    """
    prompt = record.prompt if completion_only else 0
    if not record.messages:
        end: Any = tokenizer.eos_token or ""
        text = plain_text(record)
        text = text if text.endswith(end) else text + end
        return Rendered(text, [(prompt, len(text), True)], plain=True)
    turns = {i: counts(m) and i >= prompt for i, m in enumerate(record.messages) if m["role"] == "assistant"}
    if marked := _MARKED.search(tokenizer.get_chat_template(tools=record.tools)) is not None:
        text, marks = _checked(lambda: render_with_marks(tokenizer, record.messages, record.tools, record.template))
    else:
        text, marks = render(tokenizer, record), []
    spans = []
    if not assistant_only:
        spans.append((len(_head(tokenizer, record, prompt, text)) if prompt else 0, len(text), True))
    if marked and all(turns.values()):
        return Rendered(text, [*spans, *((*mark, True) for mark in marks)], plain=False)
    if marked and len(marks) != len(turns):
        raise InputError(f"the chat template marks {len(marks)} generations of {len(turns)} assistant turns")
    for (i, value), mark in zip(turns.items(), marks or [None] * len(turns), strict=True):
        if value != (not assistant_only and i >= prompt):  # else it is as what is around it
            spans.append((*(mark or _turn(tokenizer, record, i, text)), value))
    return Rendered(text, spans, plain=False)


def _turn(tokenizer: PreTrainedTokenizerBase, record: Record, i: int, whole: str) -> tuple[int, int]:
    """Which characters of the whole are the assistant turn ``i``."""
    last = i + 1 == len(record.messages)
    upto = whole if last else _prefix(render(tokenizer, record, record.messages[: i + 1]), whole)
    return len(_head(tokenizer, record, i, upto)), len(upto)


def _head(tokenizer: PreTrainedTokenizerBase, record: Record, i: int, whole: str) -> str:
    """The rendering up to message ``i``; where that is an answer, up to its content."""
    answered = record.messages[i]["role"] == "assistant"
    return _prefix(render(tokenizer, record, record.messages[:i], add_generation_prompt=answered), whole)


def _prefix(text: str, whole: str) -> str:
    if not whole.startswith(text):
        raise InputError(
            "the chat template renders a prefix of a conversation differently from the whole, and has no "
            "{% generation %} marks that would tell the turns"
        )
    return text


def plain_text(record: Record) -> str:
    """The text of a record that is no conversation. Raises InputError for one that is too long."""
    if len(record.text) > TEXT:
        raise InputError(f"the text has {len(record.text):,} characters; at most {TEXT:,} are read")
    return record.text


def render(
    tokenizer: PreTrainedTokenizerBase,
    record: Record,
    messages: Messages | None = None,
    add_generation_prompt: bool = False,
) -> str:
    """The text of a conversation, or of the part of it that ``messages`` is.

    Raises InputError for whatever a template, which is read from a file, makes of it.
    """

    def of_template() -> tuple[str, list]:
        text = tokenizer.apply_chat_template(
            record.messages if messages is None else messages,
            tools=record.tools,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **record.template,
        )
        return text, []  # pyright: ignore[reportReturnType]

    return _checked(of_template)[0]


def _checked(of_template: Callable[[], tuple[str, list[tuple[int, int]]]]) -> tuple[str, list[tuple[int, int]]]:
    try:
        text, marks = of_template()
    except Exception as error:
        raise InputError(f"the chat template cannot render it ({first_line(error)})") from error
    if len(text) > TEXT:
        raise InputError(f"the chat template makes {len(text):,} characters of it; at most {TEXT:,} are read")
    return text, marks

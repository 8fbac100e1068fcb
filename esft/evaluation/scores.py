"""How right a model's answers are."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from esft.data.records import Record
from esft.evaluation.answers import answer, split_prompt


def matches(given: str, expected: str) -> bool:
    """Exact match: of the parsed values where the expected answer is a JSON object or list, else of the text."""
    try:
        wanted = json.loads(expected)
    except json.JSONDecodeError:
        wanted = None
    if not isinstance(wanted, dict | list):
        return given.strip() == expected.strip()
    try:
        return json.loads(given) == wanted
    except (ValueError, RecursionError):  # no JSON, or a number too long or nesting too deep to read
        return False


def exact_match(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
    batch_size: int = 64,
    progress: bool = False,
) -> tuple[float, list[dict[str, Any]]]:
    """Share of records whose last answer the model gives exactly, and every record's outcome.

    An outcome has the keys prompt, expected, given, correct.
    """
    pairs = [split_prompt(record) for record in records]
    # An answer longer than any expected one is wrong already.
    longest = max(len(tokenizer(expected, add_special_tokens=False)["input_ids"]) for _, expected in pairs)
    given = answer(model, tokenizer, [prompt for prompt, _ in pairs], longest + 2, batch_size, progress)
    outcomes = [
        {"prompt": _last_words(prompt), "expected": e, "given": g, "correct": matches(g, e)}
        for (prompt, e), g in zip(pairs, given, strict=True)
    ]
    return sum(o["correct"] for o in outcomes) / len(outcomes), outcomes


def _last_words(prompt: Record) -> str:
    return prompt.messages[-1].get("content", "") if prompt.messages else prompt.text

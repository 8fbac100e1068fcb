"""What is measured of a model on one set of records."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from esft.checkpoint.source import Reach
from esft.data.encoding import Encoder
from esft.data.examples import Example
from esft.data.records import Record
from esft.errors import InputError
from esft.evaluation.answers import answer, encode_prompts, end_tokens
from esft.evaluation.choices import candidates, choose
from esft.evaluation.expected import Expected, expected_answer, split_prompt
from esft.evaluation.loss import causal_lm_of, mean_loss
from esft.evaluation.text_scores import TEXT_SCORES, check_libraries, matches


@dataclass(frozen=True)
class EvalSet:
    """What a model is measured on.

    Attributes:
        name: among several; empty for the only one.
        source: where the records are from, for messages.
        examples: rows for the loss.
        records: for the other scores; may be empty where there are none.
    """

    name: str
    source: str
    examples: Sequence[Example]
    records: Sequence[Record] = ()

    def check(self, tokenizer: PreTrainedTokenizerBase, reach: Reach, scores: Sequence[str]) -> None:
        """Raise InputError for what a score cannot be measured on, naming it, before anything slow is begun."""
        check_libraries(scores)
        try:
            if any(score in TEXT_SCORES for score in scores):
                encode_prompts(tokenizer, [split_prompt(record)[0] for record in self.records], reach)
            if "choices" in scores:
                encoder = Encoder(tokenizer, reach.positions, reach.vocabulary)
                for record in self.records:
                    if any(cut for _, cut in encoder.encode_some(candidates(record))):
                        raise InputError(f"{record.place}: a choice reaches the model's {reach.positions} positions")
        except InputError as error:
            raise InputError(f"{self.source}: {error}") from error


@dataclass(frozen=True)
class Measured:
    """What came out.

    Attributes:
        scores: by name.
        answers: of every record prompt and expected, given and correct where answers were compared, and chosen where
            there were choices.
    """

    scores: dict[str, float]
    answers: list[dict[str, Any]] = field(default_factory=list)


def measure(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    data: EvalSet,
    scores: Sequence[str] = ("loss",),
    batch_size: int = 32,
    progress: bool = False,
) -> Measured:
    """Measure a model on a set. Leaves it in evaluation mode.

    Args:
        scores: of "loss" (mean cross entropy in nats over what is supervised), "choices" (share of records whose
            likeliest choice is right) and ``TEXT_SCORES`` of the greedy answers.
        batch_size: records that go through the model together.
        progress: show bars.

    Raises InputError as ``EvalSet.check`` does, and for a model that gives no numbers but as its loss.
    """
    found: dict[str, float] = {}
    if "loss" in scores:
        found["loss"] = mean_loss(model, data.examples, tokenizer.pad_token_id, batch_size)
        if not math.isfinite(found["loss"]):
            return Measured(found)
    compared = [score for score in scores if score in TEXT_SCORES]
    expected: list[Expected] = []
    if compared or "choices" in scores:
        ends = end_tokens(model, tokenizer)
        expected = [expected_answer(tokenizer, record, ends) for record in data.records]
    answers: list[dict[str, Any]] = [{"prompt": _last_words(e.prompt), "expected": e.text} for e in expected]
    if compared:
        given = _answers(model, tokenizer, expected, batch_size, progress)
        for each, text in zip(answers, given, strict=True):
            each |= {"given": text, "correct": matches(text, each["expected"])}
        pairs = [(each["given"], each["expected"]) for each in answers]
        found |= {score: TEXT_SCORES[score](pairs) for score in compared}
    if "choices" in scores:
        reach = Reach.of(causal_lm_of(model).config)
        encoder = Encoder(tokenizer, reach.positions, reach.vocabulary)
        for each, text in zip(answers, choose(model, encoder, data.records, progress), strict=True):
            each["chosen"] = text
        found["choices"] = sum(each["chosen"] == each["expected"] for each in answers) / len(answers)
    return Measured({score: found[score] for score in scores}, answers)


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
    found = measure(model, tokenizer, EvalSet("", "", (), records), ["exact_match"], batch_size, progress)
    return found.scores["exact_match"], found.answers


def _answers(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, expected: Sequence[Expected], batch_size: int, progress: bool
) -> list[str]:
    # An answer longer than any expected one is wrong already.
    longest = max(each.tokens for each in expected)
    given = answer(model, tokenizer, [each.prompt for each in expected], longest + 2, batch_size, progress)
    return [each.without_lead(text) for each, text in zip(expected, given, strict=True)]


def _last_words(prompt: Record) -> str:
    return prompt.messages[-1].get("content", "") if prompt.messages else prompt.text

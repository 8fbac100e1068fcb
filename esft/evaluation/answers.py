"""Greedy answers of a model to the prompts of records."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerBase

from esft.checkpoint.source import Reach
from esft.data.batches import collate
from esft.data.encoding import encode_prompt
from esft.data.examples import Example
from esft.data.records import Record
from esft.errors import InputError
from esft.evaluation.loss import causal_lm_of


@torch.no_grad()
def answer(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Record],
    max_new_tokens: int = 128,
    batch_size: int = 64,
    progress: bool = False,
) -> list[str]:
    """Greedy answers to conversations that end with a user turn, or to texts, in the given order.

    None goes beyond the model's positions, and nothing else that its generation settings say is used. Raises
    InputError, before any work, for a prompt that the model has no positions or tokens for; and for a model whose
    logits are no numbers.
    """
    model.eval()
    reach = Reach.of(causal_lm_of(model).config)
    encoded = encode_prompts(tokenizer, prompts, reach)
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i].ids))
    answers = [""] * len(encoded)
    pad: Any = tokenizer.pad_token_id
    for start in tqdm(range(0, len(order), batch_size), desc="generate", disable=not progress, unit="batch"):
        part = order[start : start + batch_size]
        batch = collate([encoded[i] for i in part], pad, left=True)
        prompt_length = batch["input_ids"].shape[1]
        left = (reach.positions or math.inf) - max(len(encoded[i].ids) for i in part)
        with _plain_settings(causal_lm_of(model)):
            out = model.generate(
                input_ids=batch["input_ids"].to(causal_lm_of(model).device),
                attention_mask=batch["attention_mask"].to(causal_lm_of(model).device),
                max_new_tokens=int(min(max_new_tokens, left)),
                do_sample=False,
                pad_token_id=pad,
                eos_token_id=tokenizer.eos_token_id,
                logits_processor=[_check_logits],
            )
        for i, row in zip(part, out, strict=True):
            answers[i] = tokenizer.decode(row[prompt_length:], skip_special_tokens=True)
    return answers


@contextmanager
def _plain_settings(causal_lm: Any) -> Iterator[None]:
    """Without the model's own generation settings: some of them do more than to choose the likeliest token."""
    own = causal_lm.generation_config
    causal_lm.generation_config = GenerationConfig()
    try:
        yield
    finally:
        causal_lm.generation_config = own


def _check_logits(input_ids: Tensor, logits_BV: Tensor) -> Tensor:
    """The logits of the next tokens. Raises InputError where a row has no largest one; one alone may be -inf."""
    if not bool(logits_BV.amax(dim=-1).isfinite().all()):
        raise InputError(
            "the model's logits are no numbers: its weights or the adapter's hold what is none, or too much"
        )
    return logits_BV


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Record], reach: Reach, longest: int | None = None
) -> list[Example]:
    """Prompts up to where the answer begins, as examples.

    Args:
        reach: of the model.
        longest: tokens that a prompt may have, where that is less than the model's positions.

    Raises InputError naming the prompt that is longer, that the model lacks a token for, or that cannot be rendered.
    """
    encoded = []
    for number, prompt in enumerate(prompts, 1):
        try:
            ids = encode_prompt(tokenizer, prompt)
        except InputError as error:
            raise InputError(f"prompt {number}: {error}") from error
        if longest is not None and len(ids) > longest:
            raise InputError(f"prompt {number}: has {len(ids)} tokens, more than `max_length={longest}`")
        if reach.positions is not None and len(ids) >= reach.positions:
            raise InputError(f"prompt {number}: has {len(ids)} tokens, and the model {reach.positions} positions")
        if reach.vocabulary is not None and max(ids) >= reach.vocabulary:
            raise InputError(f"prompt {number}: has token {max(ids)}; the model has {reach.vocabulary} tokens")
        encoded.append(Example(ids, ids))
    return encoded


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
    last = max(i for i, message in enumerate(record.messages) if message["role"] == "assistant")
    return replace(record, messages=record.messages[:last]), record.messages[last].get("content", "")

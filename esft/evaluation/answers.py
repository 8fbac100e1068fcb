"""Greedy answers of a model to the prompts of records."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
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
from esft.parallel.join import current


@torch.no_grad()
def answer(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Record],
    max_new_tokens: int = 128,
    batch_size: int = 64,
    progress: bool = False,
    adapter_names: Sequence[str] | None = None,
    **watching: Any,
) -> list[str]:
    """Greedy answers to conversations that end with a user turn, or to texts, in the given order.

    Args:
        adapter_names: one for each prompt, of a model that holds adapters side by side.
        watching: ``streamer`` and ``stopping_criteria`` of transformers' ``generate``.

    None goes beyond the model's positions. Of its generation settings only the tokens that end an answer are used.
    Raises InputError, before any work, for a prompt that the model has no positions or tokens for; and for a model
    whose logits are no numbers. Collective in a job of several processes, which share the prompts.
    """
    model.eval()
    ranks = current()
    reach = Reach.of(causal_lm_of(model).config)
    encoded = encode_prompts(tokenizer, prompts, reach)
    every = range(len(encoded))
    own = every if ranks.lockstep else ranks.share(every, lambda i: len(encoded[i].ids))
    order = sorted(own, key=lambda i: len(encoded[i].ids))
    answers: dict[int, str] = {}
    ends = end_tokens(model, tokenizer)
    pad: Any = tokenizer.pad_token_id

    def tell(input_ids: Tensor, logits_BV: Tensor) -> Tensor:
        ranks.progress()  # at every token: all of a batch's may take longer than others have patience
        return logits_BV

    for start in tqdm(range(0, len(order), batch_size), desc="generate", disable=not progress, unit="batch"):
        part = order[start : start + batch_size]
        batch = collate([encoded[i] for i in part], pad, left=True)
        prompt_length = batch["input_ids"].shape[1]
        adapters = {} if adapter_names is None else {"adapter_names": [adapter_names[i] for i in part]}
        left = (reach.positions or math.inf) - max(len(encoded[i].ids) for i in part)
        with _plain_settings(causal_lm_of(model)):
            out = model.generate(
                input_ids=batch["input_ids"].to(causal_lm_of(model).device),
                attention_mask=batch["attention_mask"].to(causal_lm_of(model).device),
                max_new_tokens=int(min(max_new_tokens, left)),
                do_sample=False,
                pad_token_id=pad,
                eos_token_id=ends or None,
                logits_processor=[_check_logits, tell],
                synced_gpus=ranks.lockstep,  # sums that differ in their last bits may end an answer on one rank alone
                **adapters,
                **watching,
            )
        for i, row in zip(part, out, strict=True):
            given = takewhile(lambda token: token not in ends, row[prompt_length:].tolist())
            answers[i] = tokenizer.decode(list(given), skip_special_tokens=True)
    # Where all ranks have made all of them, the first one's count.
    found = dict(pair for pairs in reversed(ranks.gathered(list(answers.items()))) for pair in pairs)
    return [found[i] for i in every]


def end_tokens(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer: the tokenizer's, and those of the model's generation settings, of which a turn may
    have another than a text."""
    settings = causal_lm_of(model).generation_config
    said = getattr(settings, "eos_token_id", None)
    listed = said if isinstance(said, list) else [said]
    return list(dict.fromkeys(token for token in (tokenizer.eos_token_id, *listed) if isinstance(token, int)))


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
    """Prompts as ``encode_within`` has them; its error names the prompt, by its number."""
    encoded = []
    for number, prompt in enumerate(prompts, 1):
        try:
            encoded.append(encode_within(tokenizer, prompt, reach, longest))
        except InputError as error:
            raise InputError(f"prompt {number}: {error}") from error
    return encoded


def encode_within(
    tokenizer: PreTrainedTokenizerBase, prompt: Record, reach: Reach, longest: int | None = None
) -> Example:
    """A prompt up to where the answer begins, as an example.

    Args:
        reach: of the model.
        longest: tokens that a prompt may have, where that is less than the model's positions.

    Raises InputError where it is longer, where the model lacks a token for it, and where it cannot be rendered.
    """
    ids = encode_prompt(tokenizer, prompt)
    if longest is not None and len(ids) > longest:
        raise InputError(f"has {len(ids)} tokens, more than `max_length={longest}`")
    if reach.positions is not None and len(ids) >= reach.positions:
        raise InputError(f"has {len(ids)} tokens, and the model {reach.positions} positions")
    if reach.vocabulary is not None and max(ids) >= reach.vocabulary:
        raise InputError(f"has token {max(ids)}; the model has {reach.vocabulary} tokens")
    return Example(ids, ids)

"""Answers by likelihood: the likeliest of the choices that a record has."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn
from tqdm import tqdm

from esft.data.batches import collate
from esft.data.encoding import Encoder
from esft.data.records import Record
from esft.errors import InputError
from esft.evaluation.expected import split_prompt
from esft.evaluation.loss import batch_loss
from esft.parallel.join import current


@torch.no_grad()
def choose(model: nn.Module, encoder: Encoder, records: Sequence[Record], progress: bool = False) -> list[str]:
    """Of each record the choice with the largest likelihood as its last answer, the end marker included.

    Raises InputError as ``candidates`` does, and for a model whose likelihoods are no numbers. Collective in a job of
    several processes, which share the records.
    """
    model.eval()
    ranks, pad = current(), encoder.tokenizer.pad_token_id
    every = range(len(records))
    own = every if ranks.lockstep else ranks.share(every, lambda i: len(records[i].choices or ()))
    chosen: dict[int, str] = {}
    for i in tqdm(own, desc="choose", disable=not progress, unit="record"):
        record = records[i]
        examples = [example for example, _ in encoder.encode_some(candidates(record))]
        losses = [batch_loss(model, collate([example], pad))[0].item() for example in examples]
        if not all(map(math.isfinite, losses)):
            raise InputError(f"{record.place}: the likelihoods are no numbers: the weights hold what is none")
        chosen[i] = (record.choices or [])[losses.index(min(losses))]
        ranks.progress()
    found = dict(pair for pairs in ranks.gathered(list(chosen.items())) for pair in pairs)
    return [found[i] for i in every]


def candidates(record: Record) -> list[Record]:
    """The record with each of its choices as its last answer. Raises InputError without choices."""
    if not record.choices:
        raise InputError(f"{record.place or 'a record'}: has no choices (a list of at least two texts, no two alike)")
    prompt, expected = split_prompt(record)
    if expected not in record.choices:
        raise InputError(f"{record.place or 'a record'}: the expected answer is none of the choices")
    if not record.messages:
        return [replace(prompt, text=prompt.text + choice) for choice in record.choices]
    turns = ({"role": "assistant", "content": choice} for choice in record.choices)
    return [replace(prompt, messages=[*prompt.messages, turn]) for turn in turns]

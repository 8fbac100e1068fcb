"""Measuring a model: loss over assistant turns, greedy answers, exact match."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerBase

from esft.checkpoint.source import Reach
from esft.data.batches import collate
from esft.data.encoding import encode_prompt
from esft.data.examples import IGNORE, Example
from esft.data.records import Record
from esft.errors import InputError
from esft.experts.model_state import once_per_model
from esft.training.loss import linear_cross_entropy


def _causal_lm(model: nn.Module) -> Any:
    """The transformers model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def has_plain_head(model: nn.Module) -> bool:
    """Whether the logits are the last hidden states times the head's weight; some models scale, shift or cap them.

    Tried out on two tokens the first time, and kept on the model.
    """
    return _has_plain_head(_causal_lm(model))


@once_per_model
@torch.no_grad()
def _has_plain_head(causal_lm: Any) -> bool:
    head = causal_lm.get_output_embeddings()
    # What PEFT puts in the head's place is no Linear, and starts out as if it were plain.
    return isinstance(head, nn.Linear) and head.bias is None and _gives_products(causal_lm, head.weight)


def _gives_products(causal_lm: Any, weight_VD: Tensor) -> bool:
    """Whether a causal LM's logits are hidden states times this weight, also where they are large."""
    plain = torch.empty(0)

    def enlarge(module: nn.Module, args: tuple, output: Any) -> None:
        nonlocal plain
        hidden = output.last_hidden_state
        # A cap on small logits changes less than 16-bit rounding does; none leaves a thousand as it is.
        weight_DV = weight_VD.T.to(hidden.device)
        output.last_hidden_state = hidden * (1e3 / (hidden @ weight_DV).abs().max())
        plain = output.last_hidden_state @ weight_DV

    hook = causal_lm.base_model.register_forward_hook(enlarge)
    try:
        tokens = torch.arange(2, device=causal_lm.device)[None]
        logits = causal_lm(input_ids=tokens, use_cache=False).logits
    finally:
        hook.remove()
    tolerance = 8 * torch.finfo(logits.dtype).eps
    plain = plain.to(logits.device)
    return plain.shape == logits.shape and bool((plain - logits).abs().max() <= tolerance * plain.abs().max())


def batch_loss(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
    """Summed cross entropy in nats over the supervised positions of a batch in the CPU's memory, and their number.

    Logits are made for supervised positions only, where the model has nothing but a matrix between hidden states and
    logits.
    """
    causal_lm = _causal_lm(model)
    # Where documents share rows, transformers makes its mask of their positions, and of them only without another.
    apart = "position_ids" if "position_ids" in batch else "attention_mask"
    inputs = {name: batch[name].to(causal_lm.device) for name in ("input_ids", apart)}
    # The supervised positions are found on the CPU and sent ahead: afterwards, either would wait for the forward pass.
    labels = batch["labels"][:, 1:]
    wanted = torch.where(labels != IGNORE)
    count = len(wanted[0])
    if not has_plain_head(model):
        labels = labels.to(causal_lm.device)
        logits = causal_lm(**inputs, use_cache=False).logits[:, :-1].float()
        labels = labels.to(logits.device)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum"), count
    weight = causal_lm.get_output_embeddings().weight
    where = weight.device  # over several GPUs not every layer is where the inputs go
    labels, *places = (tensor.to(where) for tensor in (labels[wanted], *wanted))
    hidden = causal_lm.base_model(**inputs, use_cache=False).last_hidden_state
    hidden = hidden[tuple(place.to(hidden.device) for place in places)]
    return linear_cross_entropy(hidden.to(where), weight, labels), count


@torch.no_grad()
def mean_loss(model: nn.Module, examples: Sequence[Example], pad: int, batch_size: int = 32) -> float:
    """Mean cross entropy in nats over the supervised tokens of all examples. Leaves the model in evaluation mode."""
    model.eval()
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].ids))
    total, count = 0.0, 0
    for start in range(0, len(order), batch_size):
        batch = collate([examples[i] for i in order[start : start + batch_size]], pad)
        loss, targets = batch_loss(model, batch)
        total, count = total + loss.item(), count + targets
    return total / max(count, 1)


@torch.no_grad()
def answer(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Record],
    max_new_tokens: int = 128,
    batch_size: int = 64,
    progress: bool = False,
    **watching: Any,
) -> list[str]:
    """Greedy answers to conversations that end with a user turn, or to texts, in the given order.

    Args:
        watching: ``streamer`` and ``stopping_criteria`` of transformers' ``generate``.

    None goes beyond the model's positions, and nothing else that its generation settings say is used. Raises
    InputError, before any work, for a prompt that the model has no positions or tokens for; and for a model whose
    logits are no numbers.
    """
    model.eval()
    reach = Reach.of(_causal_lm(model).config)
    encoded = encode_prompts(tokenizer, prompts, reach)
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i].ids))
    answers = [""] * len(encoded)
    pad: Any = tokenizer.pad_token_id
    for start in tqdm(range(0, len(order), batch_size), desc="generate", disable=not progress, unit="batch"):
        part = order[start : start + batch_size]
        batch = collate([encoded[i] for i in part], pad, left=True)
        prompt_length = batch["input_ids"].shape[1]
        left = (reach.positions or math.inf) - max(len(encoded[i].ids) for i in part)
        with _plain_settings(_causal_lm(model)):
            out = model.generate(
                input_ids=batch["input_ids"].to(_causal_lm(model).device),
                attention_mask=batch["attention_mask"].to(_causal_lm(model).device),
                max_new_tokens=int(min(max_new_tokens, left)),
                do_sample=False,
                pad_token_id=pad,
                eos_token_id=tokenizer.eos_token_id,
                logits_processor=[_check_logits],
                **watching,
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

"""Measuring which routed experts a task uses (paper, section 3.2)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from esft.errors import InputError
from esft.families import GATE, MoELayer, moe_layers
from esft.files import read_json, write_json

Scores = dict[int, dict[int, float]]  # layer -> expert -> score


@dataclass(frozen=True)
class ExpertScores:
    """Scores of every routed expert, the published ``summary.json``.

    Attributes:
        token_scores: share of a layer's (token, slot) assignments that an expert got; a layer sums to 1.
        gate_scores: mean over tokens of the expert's gate value before any renormalisation or scaling, counted as 0
            where the expert is not among a token's top K; a layer sums to less than 1.
    """

    token_scores: Scores
    gate_scores: Scores

    def save(self, path: str | Path) -> None:
        """Write the published layout; raises InputError when the file cannot be written."""
        write_json(path, {"token_scores": _to_json(self.token_scores), "gate_scores": _to_json(self.gate_scores)})

    @classmethod
    def load(cls, path: str | Path) -> ExpertScores:
        """Layers and experts in ascending order. Raises InputError naming the file."""
        raw = read_json(path)
        try:
            scores = cls(_from_json(raw["token_scores"]), _from_json(raw["gate_scores"]))
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
            raise InputError(
                f'{path}: not a score file ({{"token_scores": {{layer: {{expert: score}}}}, "gate_scores": ...}})'
            ) from error
        for layer, experts in (*scores.token_scores.items(), *scores.gate_scores.items()):
            for expert, score in experts.items():
                if not 0 <= score < math.inf:
                    raise InputError(f"{path}: layer {layer}: expert {expert} has score {score}, not a finite share")
        return scores

    def check(self, layers: Mapping[int, int]) -> None:
        """Raise InputError unless the scores are of a model with these layers (index -> number of experts)."""
        for scores in (self.token_scores, self.gate_scores):
            scored = {layer: len(experts) for layer, experts in scores.items()}
            if scored != dict(layers):
                raise InputError(
                    f"score file is of another model: it has {_shape(scored)}, the model has {_shape(dict(layers))}"
                )
            for layer, experts in scores.items():
                if strange := set(experts) - set(range(layers[layer])):
                    raise InputError(f"score file is of another model: layer {layer} has no expert {min(strange)}")


def _shape(layers: dict[int, int]) -> str:
    return f"layers {min(layers)}-{max(layers)} with {sorted(set(layers.values()))} experts" if layers else "no layers"


def _to_json(scores: Scores) -> dict[str, dict[str, float]]:
    return {str(layer): {str(e): s for e, s in experts.items()} for layer, experts in scores.items()}


def _from_json(raw: dict[str, dict[str, float]]) -> Scores:
    layers = {int(layer): {int(e): float(s) for e, s in experts.items()} for layer, experts in raw.items()}
    return {layer: dict(sorted(layers[layer].items())) for layer in sorted(layers)}


def _softmax(logits_TE: Tensor) -> Tensor:
    return logits_TE.softmax(dim=-1)


# What routers make of their logits before they choose; some return the probabilities in the logits' place.
GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": _softmax,
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": lambda logits_TE: F.softplus(logits_TE).sqrt(),
    "probabilities": lambda logits_TE: logits_TE,
}


def gate_of(logits_TE: Tensor, index_TK: Tensor, weights_TK: Tensor) -> str | None:
    """The name in ``GATES`` of what a router applied to its logits; None where it cannot be told.

    Renormalising over the chosen experts, scaling, and a softmax over the chosen logits alone all leave a token's
    weights in proportion to its gate values, so the right function is the one with that proportion. One choice a token
    tells nothing.
    """
    if index_TK.shape[1] < 2:
        return None
    weights_dtype, weights_TK = weights_TK.dtype, weights_TK.float()
    share_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
    errors: dict[str, Tensor] = {}
    for name, function in GATES.items():
        gates_TK = function(logits_TE.float()).gather(1, index_TK)
        errors[name] = (gates_TK / gates_TK.sum(dim=-1, keepdim=True) - share_TK).abs()
    best = min(errors, key=lambda name: float(errors[name].mean()))
    tolerance = 8 * max(torch.finfo(logits_TE.dtype).eps, torch.finfo(weights_dtype).eps)
    return best if errors[best].max() <= tolerance else None


class _Counter:
    """Counts of one layer, filled by hooks on its router and its experts."""

    def __init__(self, layer: MoELayer, gate: str | None):
        self.layer, self.gate = layer, gate
        self.rows_E = torch.zeros(layer.num_experts, dtype=torch.float64)
        self.gates_E = torch.zeros(layer.num_experts, dtype=torch.float64)
        self.logits: Tensor | None = None
        self.keep_T: Tensor | None = None

    def on_router(self, module: nn.Module, args: tuple, output: tuple) -> None:
        self.logits = output[0]

    def on_experts(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        _, index_TK, weights_TK = (*args, *kwargs.values())
        assert self.logits is not None and self.keep_T is not None
        if index_TK.shape[0] != self.keep_T.numel():
            tokens = f"{index_TK.shape[0]} of {self.keep_T.numel()} tokens"
            raise InputError(f"{self.layer.name}: gets {tokens}, so they cannot be scored")
        logits_TE = self.logits.reshape(index_TK.shape[0], -1)[self.keep_T]
        index_TK, weights_TK = index_TK[self.keep_T], weights_TK[self.keep_T]
        if not index_TK.numel():
            return
        self.gate = self.gate or gate_of(logits_TE, index_TK, weights_TK)
        if self.gate is None:
            raise InputError(f"{self.layer.name}: the router makes of its logits none of {', '.join(GATES)}")
        gates_TE = GATES[self.gate](logits_TE.float())
        # A weight of 0 says that the slot is empty: some routers can skip the experts.
        taken = (weights_TK != 0).flatten().cpu()
        chosen = index_TK.flatten().cpu()[taken]
        self.rows_E += torch.bincount(chosen, minlength=self.rows_E.numel())
        self.gates_E.index_add_(0, chosen, gates_TE.gather(1, index_TK).flatten().double().cpu()[taken])


@torch.no_grad()
def score_experts(
    model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]], max_tokens: int = 131_072
) -> ExpertScores:
    """Run the model over a task's data and count which experts its tokens go to.

    Args:
        model: stock or swapped; left as it was.
        batches: dicts with ``input_ids`` [B, L] and optionally ``attention_mask`` [B, L]; masked positions never count.
        max_tokens: stop after this many tokens (the paper's 32 x 4096).

    Scores are token means per layer, as in the published score files. What the router applies to its logits is told
    from the weights that it makes of them (see ``gate_of``), or is known of the family. Raises InputError when no token
    was seen, for a model without MoE layers, and for routers whose gate values cannot be told.
    """
    layers = moe_layers(model)
    if listed := [layer.name for layer in layers if isinstance(layer.experts, nn.ModuleList)]:
        raise InputError(f"{listed[0]}: experts in a ModuleList hide which tokens they get, and cannot be scored")
    known = GATE.get(model.config.get_text_config().model_type)
    counters = [_Counter(layer, known) for layer in layers]
    handles = [c.layer.router.register_forward_hook(c.on_router) for c in counters]
    handles += [c.layer.experts.register_forward_pre_hook(c.on_experts, with_kwargs=True) for c in counters]
    was_training = model.training
    model.eval()
    seen = 0
    try:
        for batch in batches:
            input_ids = batch["input_ids"].to(model.device)
            mask = batch.get("attention_mask")
            mask = torch.ones_like(input_ids) if mask is None else mask.to(model.device)
            keep_T = mask.flatten().bool()
            keep_T &= keep_T.cumsum(0) <= max_tokens - seen
            for counter in counters:
                counter.keep_T = keep_T
            model.base_model(input_ids=input_ids, attention_mask=mask, use_cache=False)
            seen += int(keep_T.sum())
            if seen >= max_tokens:
                break
    finally:
        for handle in handles:
            handle.remove()
        model.train(was_training)
    if seen == 0:
        raise InputError("no tokens to score: the data set is empty")
    counters = [c for c in counters if c.rows_E.any()]  # without the experts of a tower that saw no token
    token_scores = {c.layer.index: _by_expert(c.rows_E / c.rows_E.sum()) for c in counters}
    gate_scores = {c.layer.index: _by_expert(c.gates_E / seen) for c in counters}
    return ExpertScores(token_scores, gate_scores)


def _by_expert(score_E: Tensor) -> dict[int, float]:
    return dict(enumerate(score_E.tolist()))

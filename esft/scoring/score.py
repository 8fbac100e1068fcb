"""Measuring which routed experts a task uses (paper, section 3.2)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from esft.errors import InputError
from esft.experts.moe_layers import MoELayer, is_apart, moe_layers
from esft.parallel.join import current
from esft.parallel.ranks import Ranks
from esft.scoring.expert_scores import ExpertScores
from esft.scoring.outputs import output_sums
from esft.scoring.routers import Choice, watch_routers


class _Counts:
    """Counts of one layer."""

    def __init__(self, layer: int, num_experts: int):
        self.layer = layer
        self.rows_E = torch.zeros(num_experts, dtype=torch.float64)
        self.gates_E: Tensor | None = torch.zeros(num_experts, dtype=torch.float64)
        self.outputs_E = torch.zeros(num_experts, dtype=torch.float64)

    def add(self, choice: Choice) -> None:
        taken = choice.taken_TK.flatten().cpu()
        chosen = choice.index_TK.flatten().cpu()[taken]
        self.rows_E += torch.bincount(chosen, minlength=self.rows_E.numel())
        if choice.gates_TE is None or self.gates_E is None:
            self.gates_E = None
            return
        gates = choice.gates_TE.gather(1, choice.index_TK).flatten().double().cpu()
        if not bool(gates.isfinite().all()):
            raise InputError(f"layer {self.layer}: its router decides by what is no number; the weights hold such")
        self.gates_E.index_add_(0, chosen, gates[taken])

    def add_up(self, ranks: Ranks) -> None:
        """Over all ranks; collective."""
        gates_E = torch.zeros_like(self.rows_E) if self.gates_E is None else self.gates_E
        unknown = torch.tensor([[self.gates_E is None] * len(gates_E)])
        own = torch.cat([torch.stack([self.rows_E, self.outputs_E, gates_E]), unknown])
        self.rows_E, self.outputs_E, gates_E, unknown_E = ranks.sum(own)
        self.gates_E = None if unknown_E.any() else gates_E


class _Watched(Exception):
    """Every router of a batch has chosen; what comes after the last one tells nothing."""


@torch.no_grad()
def score_experts(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Tensor]],
    max_tokens: int = 131_072,
    progress: bool = False,
    outputs: bool = False,
) -> ExpertScores:
    """Run the model over a task's data and count which experts its tokens go to.

    Args:
        model: stock or swapped; left as it was.
        batches: dicts with ``input_ids`` [B, L] and optionally ``attention_mask`` [B, L]; masked positions never count.
            With ``position_ids`` [B, L] that begin anew, rows hold several documents that do not see each other.
        max_tokens: stop after this many tokens (the paper's 32 x 4096).
        progress: show a bar, in tokens.
        outputs: also score what the experts put out (``output_scores``); each layer's experts compute twice for that.

    Scores are token means per layer, as in the published score files. What the router applies to its logits is told
    from the weights that it makes of them (see ``esft.routers``), or is known of the family; one expert a token tells
    nothing, so gate scores are left out there. Raises InputError when no token was seen, for a model without MoE
    layers, for one whose weights are spread over processes, and for routers whose gate values are no numbers, or, of
    several experts a token, cannot be told.

    The LM head never runs, and from the second batch on nothing after the last router does. Collective in a job of
    several processes, which share the batches: all give the same ones.
    """
    if is_apart(model):  # its passes are collective, and batches are shared
        raise InputError("experts are not scored of a model whose weights are spread over processes")
    ranks = current()
    counts = {layer.index: _Counts(layer.index, layer.num_experts) for layer in moe_layers(model)}
    was_training = model.training
    model.eval()
    seen, calls, last = 0, 0, 0

    def count(layer: MoELayer, choice: Choice) -> None:
        nonlocal calls
        counts[layer.index].add(choice)
        if outputs:
            counts[layer.index].outputs_E += output_sums(layer, choice)
        calls += 1
        if calls == last:
            raise _Watched

    bar = tqdm(total=max_tokens, desc="score", disable=not progress, unit="token")
    try:
        for number, batch in enumerate(batches):
            input_ids = batch["input_ids"].to(model.device)
            mask = batch.get("attention_mask")
            mask = torch.ones_like(input_ids) if mask is None else mask.to(model.device)
            keep_T = mask.flatten().bool()
            keep_T &= keep_T.cumsum(0) <= max_tokens - seen
            positions = batch.get("position_ids")  # documents that share rows are kept apart by these alone
            seen_by = {"attention_mask": mask} if positions is None else {"position_ids": positions.to(model.device)}
            if number % ranks.size == ranks.rank:
                with suppress(_Watched), watch_routers(model, keep_T, count):
                    model.base_model(input_ids=input_ids, use_cache=False, **seen_by)
                last, calls = calls, 0
                ranks.progress()
            kept = int(keep_T.sum())
            seen += kept
            bar.update(kept)
            if seen >= max_tokens:
                break
    finally:
        bar.close()
        model.train(was_training)
    if seen == 0:
        raise InputError("no tokens to score: the data set is empty")
    ranks.meet()
    for layer in counts.values():
        layer.add_up(ranks)
    counts = {index: c for index, c in counts.items() if c.rows_E.any()}  # without a tower that saw no token
    token_scores = {index: by_expert(c.rows_E / c.rows_E.sum()) for index, c in counts.items()}
    gates = {index: c.gates_E for index, c in counts.items() if c.gates_E is not None}
    gate_scores = {index: by_expert(gates_E / seen) for index, gates_E in gates.items()}
    output_scores = {index: by_expert(c.outputs_E / seen) for index, c in counts.items() if outputs}
    return ExpertScores(token_scores, gate_scores, output_scores)


def by_expert(score_E: Tensor) -> dict[int, float]:
    return dict(enumerate(score_E.tolist()))

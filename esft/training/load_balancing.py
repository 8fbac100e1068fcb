"""The auxiliary loss that spreads tokens over experts. Off by default: ESFT wants a task's few experts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from esft.errors import InputError
from esft.experts.moe_layers import moe_layers
from esft.parallel.ranks import ALONE, Ranks
from esft.scoring.routers import Choice, watch_routers


def balance_loss(choice: Choice, counts: Tensor | None = None) -> Tensor:
    """E times the sum over experts of (share of the choices) x (mean share of the gate values), a scalar.

    1 where all experts are chosen alike, E where all tokens choose one (arXiv 2101.03961, section 2.2; for K > 1 as in
    arXiv 2405.04434, section 2.2.3). Differentiable through the gate values.

    Args:
        choice: of a layer.
        counts: ``counts_of`` all tokens, where the choice is that of some of them: the losses of all parts, each with
            its own gradients, then add up to that of the whole.

    Raises InputError for a choice without gate values.
    """
    if choice.gates_TE is None:
        raise InputError("routers of one expert a token do not tell their gate values, which the auxiliary loss needs")
    tokens, num_experts = choice.gates_TE.shape
    counts = counts_of(choice, num_experts) if counts is None else counts.to(choice.gates_TE.device)
    share_E = (choice.gates_TE / choice.gates_TE.sum(dim=-1, keepdim=True)).mean(dim=0)
    share_E = share_E * (tokens / counts[-1]).to(share_E.dtype)
    count_E = counts[:-1].to(share_E.dtype)
    return num_experts * (count_E / counts[:-1].sum() * share_E).sum()


def counts_of(choice: Choice, num_experts: int) -> Tensor:
    """int64 [E + 1]: how often each expert was chosen, and by how many tokens."""
    chosen = choice.index_TK[choice.taken_TK]
    counts = torch.bincount(chosen, minlength=num_experts)
    return torch.cat([counts, counts.new_tensor([choice.index_TK.shape[0]])])


@contextmanager
def balance_losses(model: nn.Module, attention_mask: Tensor | None, ranks: Ranks = ALONE) -> Iterator[list[Tensor]]:
    """A list that fills with ``balance_loss`` of every MoE layer of the forward pass inside the block, at its end.

    Args:
        model: stock or swapped.
        attention_mask: [B, L] of the batch; padding does not count. None for a rank that has no forward pass.
        ranks: over whose batches shares are counted; collective. A rank's losses are its own tokens' part.

    Raises InputError for a model that trains with gradient checkpointing: its forward pass makes no graph that the
    losses could send gradients through, or makes it twice.
    """
    if any(m.training and getattr(m, "gradient_checkpointing", False) for m in model.modules()):
        raise InputError("the auxiliary loss and gradient checkpointing do not go together: turn one of them off")
    losses: list[Tensor] = []
    choices: list[tuple[int, Choice]] = []
    keep_T = torch.zeros(0, dtype=torch.bool) if attention_mask is None else attention_mask.flatten().bool()
    with watch_routers(model, keep_T, lambda layer, choice: choices.append((layer.index, choice))):
        yield losses
    counts = _counts(model, choices, ranks) if ranks.size > 1 else {}
    losses += [balance_loss(choice, counts.get(index)) for index, choice in choices]


def _counts(model: nn.Module, choices: Sequence[tuple[int, Choice]], ranks: Ranks) -> dict[int, Tensor]:
    """``counts_of`` the tokens of all ranks, by layer."""
    sizes = {layer.index: layer.num_experts for layer in moe_layers(model)}
    own = {index: torch.zeros(size + 1, dtype=torch.int64) for index, size in sizes.items()}
    for index, choice in choices:
        own[index] += counts_of(choice, sizes[index]).cpu()
    added = ranks.sum(torch.cat([*own.values()]))
    return dict(zip(own, added.split([len(each) for each in own.values()]), strict=True))

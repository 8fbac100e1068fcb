"""The auxiliary loss that spreads tokens over experts. Off by default: ESFT wants a task's few experts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from esft.errors import InputError
from esft.scoring.routers import Choice, watch_routers


def balance_loss(choice: Choice) -> Tensor:
    """E times the sum over experts of (share of the choices) x (mean share of the gate values), a scalar.

    1 where all experts are chosen alike, E where all tokens choose one (arXiv 2101.03961, section 2.2; for K > 1 as in
    arXiv 2405.04434, section 2.2.3). Differentiable through the gate values.

    Raises InputError for a choice without gate values.
    """
    if choice.gates_TE is None:
        raise InputError("routers of one expert a token do not tell their gate values, which the auxiliary loss needs")
    num_experts = choice.gates_TE.shape[1]
    share_E = (choice.gates_TE / choice.gates_TE.sum(dim=-1, keepdim=True)).mean(dim=0)
    chosen = choice.index_TK[choice.taken_TK]
    count_E = torch.bincount(chosen, minlength=num_experts).to(share_E.dtype)
    return num_experts * (count_E / chosen.numel() * share_E).sum()


@contextmanager
def balance_losses(model: nn.Module, attention_mask: Tensor) -> Iterator[list[Tensor]]:
    """A list that fills with ``balance_loss`` of every MoE layer of the forward pass inside the block.

    Args:
        model: stock or swapped.
        attention_mask: [B, L] of the batch; padding does not count.

    Raises InputError for a model that trains with gradient checkpointing: its forward pass makes no graph that the
    losses could send gradients through, or makes it twice.
    """
    if any(m.training and getattr(m, "gradient_checkpointing", False) for m in model.modules()):
        raise InputError("the auxiliary loss and gradient checkpointing do not go together: turn one of them off")
    losses: list[Tensor] = []
    with watch_routers(model, attention_mask.flatten().bool(), lambda _, choice: losses.append(balance_loss(choice))):
        yield losses

"""Losses beside the cross entropy, both off by default.

One spreads tokens over experts, though ESFT wants a task's few; one holds a model to its base on general data.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from esft.data.examples import IGNORE
from esft.errors import InputError
from esft.evaluation.cross_entropy import chunk_rows
from esft.evaluation.loss import Predictions, predictions
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


class Base:
    """A model as it was when this was made: a copy of what trains, and nothing twice of all else.

    The copy is in the dtype that is computed in. It takes the place of what trains while the base predicts.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.values = [p.detach().clone() for p in self.trained]

    @torch.no_grad()
    def predictions(self, batch: dict[str, Tensor]) -> Predictions | None:
        """What the base predicts at a batch's supervised tokens that are mixed in; None without any.

        Not between a forward pass and its backward.
        """
        if "mixed" not in batch:
            return None
        rows = batch["mixed"].any(dim=1)
        part = {name: tensor[rows] for name, tensor in batch.items()}
        part["labels"] = part["labels"].masked_fill(~part["mixed"], IGNORE)
        if not bool((part["labels"][:, 1:] != IGNORE).any()):
            return None
        with self._in_place():
            found = predictions(self.model, part)
            # Detached, the head keeps the base's values where it trains.
            return replace(found, weight_VD=None if found.weight_VD is None else found.weight_VD.detach())

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        """The model is the base inside, and draws nothing."""
        was_training = self.model.training
        self.model.eval()
        self._exchange()
        try:
            yield
        finally:
            self._exchange()
            self.model.train(was_training)

    def _exchange(self) -> None:
        for number, parameter in enumerate(self.trained):
            parameter.data, self.values[number] = self.values[number], parameter.data


def held_loss(model: nn.Module, batch: dict[str, Tensor], base: Predictions) -> tuple[Tensor, Tensor]:
    """The summed cross entropy over a batch's supervised tokens, and KL(base || model) over those that are mixed in.

    Both are scalars in nats with gradients, of one forward pass.

    Args:
        base: what the base predicts at the latter.
    """
    predicted = predictions(model, batch)
    mixed_N = batch["mixed"][:, 1:][batch["labels"][:, 1:] != IGNORE].to(predicted.hidden_ND.device)
    hidden_ND, rows = predicted.hidden_ND[mixed_N], chunk_rows(base.vocabulary)
    divergence = torch.zeros((), device=hidden_ND.device)
    for start in range(0, len(hidden_ND), rows):
        part = slice(start, start + rows)
        # The logits of one chunk are alive at a time, and made again in the backward.
        divergence = divergence + checkpoint(
            _divergence, hidden_ND[part], predicted.weight_VD, base.hidden_ND[part], base.weight_VD,
            use_reentrant=False, preserve_rng_state=False,
        )  # fmt: skip
    return predicted.cross_entropy(), divergence


def _divergence(hidden_ND: Tensor, weight_VD: Tensor | None, base_ND: Tensor, base_VD: Tensor | None) -> Tensor:
    log_probs_NV, base_NV = (
        _log_probs(hidden, weight) for hidden, weight in ((hidden_ND, weight_VD), (base_ND, base_VD))
    )
    return F.kl_div(log_probs_NV, base_NV, reduction="sum", log_target=True)


def _log_probs(hidden_ND: Tensor, weight_VD: Tensor | None) -> Tensor:
    logits_NV = hidden_ND if weight_VD is None else hidden_ND @ weight_VD.T
    return logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32)).log_softmax(dim=-1)

"""Scoring experts by what they put out, as pruning does (arXiv 2504.06792, 2510.13999): how much of it, and where it
matters.

An expert's score is the sum over its tokens of

    routing weight x |expert's output| x (1 - cos(h, h + MoE(h)))

with h what the layer's experts get and MoE(h) what all of the token's experts add up to. The last factor is 0 where
they leave the direction of h as it is.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esft.errors import InputError
from esft.experts.moe_layers import MoELayer
from esft.scoring.routers import Choice

ROWS = 4096  # (token, expert) pairs whose outputs are in memory together


@torch.no_grad()
def output_sums(layer: MoELayer, choice: Choice) -> Tensor:
    """Every expert's score over the tokens of a choice, float64 [E] in the CPU's memory.

    Raises InputError for outputs that are no numbers.
    """
    total_E = torch.zeros(layer.num_experts, dtype=torch.float64)
    together = max(1, ROWS // choice.index_TK.shape[1])
    parts = (choice.x_TD, choice.index_TK, choice.weights_TK, choice.taken_TK)
    for x_TD, index_TK, weights_TK, taken_TK in zip(*(part.split(together) for part in parts), strict=True):
        y_TKD = outputs(layer.experts, x_TD, index_TK, taken_TK).double()
        weights_TK, x_TD = weights_TK.double(), x_TD.double()
        moe_TD = (weights_TK[..., None] * y_TKD).sum(dim=1)
        turned_T1 = 1 - F.cosine_similarity(x_TD, x_TD + moe_TD, dim=-1)[:, None]
        score_TK = weights_TK.abs() * y_TKD.norm(dim=-1) * turned_T1.clamp(min=0)
        if not bool(score_TK.isfinite().all()):
            raise InputError(f"layer {layer.index}: its experts put out what is no number; the weights hold such")
        total_E.index_add_(0, index_TK[taken_TK].cpu(), score_TK[taken_TK].cpu())
    return total_E


def outputs(experts: nn.Module, x_TD: Tensor, index_TK: Tensor, taken_TK: Tensor) -> Tensor:
    """What each chosen expert puts out, before the routing weight, [T, K, D]; zeros in empty slots.

    The module computes it itself, called with one expert a token, so that it does not matter what the family's experts
    do. Its hooks do not run.
    """
    token_N, slot_N = torch.where(taken_TK)
    index_N1 = index_TK[token_N, slot_N, None]
    y_ND = experts.forward(x_TD[token_N], index_N1, torch.ones_like(index_N1, dtype=x_TD.dtype))
    y_TKD = y_ND.new_zeros(*index_TK.shape, y_ND.shape[-1])
    y_TKD[token_N, slot_N] = y_ND
    return y_TKD

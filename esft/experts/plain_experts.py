"""Routed experts through plain PyTorch: slower, for what the kernels do not compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esft.experts.pooled_experts import Experts
from esft_kernels.pools import ExpertPools, ExpertWeights
from esft_kernels.routing import positions_of


def plain_mlp(
    x_TD: Tensor,
    position_TK: Tensor,
    weights_TK: Tensor,
    pools: ExpertPools,
    gate: Callable[[Tensor], Tensor],
    norm: nn.Module | None = None,
) -> Tensor:
    """What ``expert_mlp`` computes, one expert after the other, with any function between the projections.

    Args:
        x_TD: [T, D].
        position_TK: [T, K] places of the chosen experts in the pools; what lies past those adds nothing.
        weights_TK: [T, K] routing weights.
        pools: the weights; the pools' activation is not used.
        gate: [rows, G] -> [rows, F], differentiable.
        norm: applied to an expert's output [rows, D] before the routing weight.

    Returns [T, D]. Differentiable through autograd, which saves what it likes for every row; a frozen expert's weights
    still get no gradient, a trained one's get zeros where no token goes to it.
    """
    # One view of each expert: indexing a pool once per expert would make a gradient of the whole pool for each.
    experts = [
        ExpertWeights(*parts)
        for pool in (pools.trained, pools.frozen)
        for parts in zip(
            *([None] * len(pool.gate_up_EGD) if t is None else t.unbind() for t in pool.tensors()), strict=True
        )
    ]
    # What is asked for a gradient gets one, zeros where no row is here, as from the kernels: of dealt experts the
    # backward is collective, and no rank may leave it out.
    asked = (x_TD, weights_TK, *pools.trained.tensors())
    out_TD = torch.zeros_like(x_TD) + sum(t[:0].sum() for t in asked if t is not None)
    for position in position_TK[position_TK < len(experts)].unique().tolist():
        token, slot = torch.where(position_TK == position)
        expert = experts[position]
        y = F.linear(gate(F.linear(x_TD[token], expert.gate_up_EGD, expert.gate_up_bias_EG)), expert.down_EDF)
        if expert.down_bias_ED is not None:
            y = y + expert.down_bias_ED
        if norm is not None:
            y = norm(y)
        # No token names an expert twice, so no element is added to twice here and the sums have one order.
        out_TD = out_TD.index_add(0, token, (y * weights_TK[token, slot, None]).to(out_TD.dtype))
    return out_TD


class PlainExperts(Experts):
    """``Experts`` through ``plain_mlp``.

    Args:
        gate: see ``plain_mlp``.
        norm: see ``plain_mlp``; it stays a submodule named ``post_expert_norm``.
        The others are those of ``Experts``.
    """

    def __init__(self, *args: Any, gate: Callable[[Tensor], Tensor], norm: nn.Module | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.gate, self.post_expert_norm = gate, norm

    def activate(self, h_NG: Tensor) -> Tensor:
        """What an expert computes between its projections, [N, G] -> [N, F]; differentiable."""
        return self.gate(h_NG)

    def compute(self, x_TD: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """What the experts in the pools add to the output, in the dtype that these have."""
        adapter_T = self.adapters_of(len(x_TD))
        position = self.position if adapter_T is None else self.positions
        position_TK = positions_of(top_k_index, position, adapter_T, None if self.deal is None else self.num_held)
        return plain_mlp(x_TD, position_TK, top_k_weights, self.pools, self.gate, self.post_expert_norm)

"""The slim whole DeepSeekMoE block: router, routed experts in two pools, shared experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from esft.experts.pooled_experts import Experts


@dataclass(frozen=True)
class RouterConfig:
    """How tokens choose experts.

    DeepSeek-V2 (arXiv 2405.04434, section 2.2.2) scores with a softmax and limits a token to ``topk_group`` of
    ``num_groups`` groups, ranked by their best expert. DeepSeek-V3 (arXiv 2412.19437, section 2.1.2) scores with a
    sigmoid, adds a correction bias for the choice only, ranks groups by the sum of their two best experts, and
    renormalises the chosen scores.
    """

    num_experts: int
    top_k: int
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    num_groups: int = 1
    topk_group: int = 1
    normalise: bool = False  # divide the chosen scores by their sum
    scale: float = 1.0  # routed scaling factor, applied last

    def __post_init__(self):
        if self.scoring not in ("softmax", "sigmoid"):
            raise ValueError(f"scoring must be 'softmax' or 'sigmoid', got {self.scoring!r}")
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(f"top_k must be in 1..{self.num_experts} (the number of experts), got {self.top_k}")
        if self.num_experts % self.num_groups:
            raise ValueError(f"num_experts {self.num_experts} is not a multiple of num_groups {self.num_groups}")
        if not 1 <= self.topk_group <= self.num_groups:
            raise ValueError(
                f"topk_group must be in 1..{self.num_groups} (the number of groups), got {self.topk_group}"
            )
        if self.top_k > self.topk_group * (self.num_experts // self.num_groups):
            raise ValueError(f"top_k {self.top_k} exceeds the experts in topk_group {self.topk_group} groups")


class Router(nn.Module):
    """Scores every expert in float32 and picks each token's top K. Without gradient through the choice itself."""

    def __init__(self, config: RouterConfig, hidden_size: int):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, hidden_size))
        self.e_score_correction_bias: Tensor | None
        nn.init.normal_(self.weight, std=hidden_size**-0.5)
        bias = torch.zeros(config.num_experts) if config.scoring == "sigmoid" else None
        self.register_buffer("e_score_correction_bias", bias)

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """[T, D] -> expert ids [T, K] and float32 routing weights [T, K]."""
        c = self.config
        logits_TE = F.linear(x_TD.float(), self.weight.float())
        scores_TE = logits_TE.softmax(dim=-1) if c.scoring == "softmax" else logits_TE.sigmoid()
        choice_TE = scores_TE if self.e_score_correction_bias is None else scores_TE + self.e_score_correction_bias
        if c.num_groups > 1:
            choice_TE = self._limit_groups(choice_TE)
        index_TK = choice_TE.topk(c.top_k, dim=-1, sorted=False).indices
        weights_TK = scores_TE.gather(1, index_TK)
        if c.normalise:
            weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + 1e-20)
        return index_TK, weights_TK * c.scale

    def _limit_groups(self, choice_TE: Tensor) -> Tensor:
        """Bar the experts outside each token's best groups."""
        c = self.config
        grouped = rearrange(choice_TE, "token (group expert) -> token group expert", group=c.num_groups)
        if c.scoring == "softmax":
            group_score = grouped.amax(dim=-1)
        else:
            group_score = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(dim=-1)
        best = group_score.topk(c.topk_group, dim=-1, sorted=False).indices
        barred = torch.ones_like(group_score, dtype=torch.bool).scatter_(1, best, False)
        kept = grouped.masked_fill(barred[..., None], float("-inf"))
        return rearrange(kept, "token group expert -> token (group expert)")


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), the shape of a shared expert."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DeepSeekMoE(nn.Module):
    """The slim whole block: router, routed experts in two pools, shared experts.

    For use outside transformers, and for checkpoints whose experts are a ModuleList (arXiv 2401.06066).

    Args:
        hidden_size: D.
        intermediate_size: F of one routed expert; the shared experts are one MLP of ``num_shared * F``.
        router: how tokens choose.
        num_shared: number of shared experts, 0 for none.
        trained: ids of the routed experts that get gradients.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        router: RouterConfig,
        num_shared: int = 0,
        trained: Sequence[int] = (),
        backend: str = "auto",
    ):
        super().__init__()
        e, f, d = router.num_experts, intermediate_size, hidden_size
        self.gate = Router(router, d)
        self.experts = Experts(torch.randn(e, 2 * f, d) * d**-0.5, torch.randn(e, d, f) * f**-0.5, trained, backend)
        self.shared_experts = GatedMLP(d, num_shared * f) if num_shared else None

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        x_TD = hidden_states.flatten(0, -2)
        out_TD = self.experts(x_TD, *self.gate(x_TD))
        if self.shared_experts is not None:
            out_TD = out_TD + self.shared_experts(x_TD)
        return out_TD.view_as(hidden_states)

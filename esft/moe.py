"""The MoE modules: routed experts in two pools, and the slim whole DeepSeekMoE block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esft_kernels.activation import Activation
from esft_kernels.opaque import routed_mlp
from esft_kernels.pools import ExpertPools, ExpertWeights
from esft_kernels.routing import expert_order

SWIGLU = Activation()

PROJECTIONS = ("gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias")


class Experts(nn.Module):
    """The routed experts of one layer: a trained pool that gets gradients and a frozen pool that does not.

    Called like the experts submodule of a transformers model, ``experts(x_TD, top_k_index_TK, top_k_weights_TK)``.

    Args:
        gate_up: [E, G, D] gate and up projections, G = 2F; of experts without a gate the up projections, G = F.
        down: [E, D, F] down projections.
        trained: ids of the experts to train, in any order; they become the first rows of the trained pool.
        backend: one of ``esft_kernels.expert_mlp.BACKENDS``.
        recompute: one of ``esft_kernels.expert_mlp.RECOMPUTE``.
        gate_up_bias, down_bias: [E, G] and [E, D], both or neither.
        activation: what is computed between the projections.
        interleaved: whether the rows of ``gate_up`` are (gate, up) in turn; else all gates come before all ups.
        transposed: whether ``gate_up`` is [E, D, G] and ``down`` [E, F, D] instead; so they stay.

    The pools are copies; the arguments are left alone. Both pools are parameters (the frozen one with
    ``requires_grad=False``), so that sharding wrappers see all weights. Raises ValueError for a trained id that is
    repeated or out of range.
    """

    def __init__(
        self,
        gate_up: Tensor,
        down: Tensor,
        trained: Sequence[int] = (),
        backend: str = "auto",
        recompute: str = "none",
        *,
        gate_up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
        activation: Activation = SWIGLU,
        interleaved: bool = False,
        transposed: bool = False,
    ):
        super().__init__()
        order = expert_order(list(trained), gate_up.shape[0])
        self.trained, self.backend, self.recompute = tuple(trained), backend, recompute
        self.activation, self.interleaved, self.transposed = activation, interleaved, transposed
        s = len(self.trained)
        for name, tensor in zip(PROJECTIONS, (gate_up, down, gate_up_bias, down_bias), strict=True):
            for pool, ids in (("trained", order[:s]), ("frozen", order[s:])):
                # An empty pool that required a gradient would drag the backward through all layers below.
                trains = pool == "trained" and s > 0
                part = None if tensor is None else nn.Parameter(tensor.detach()[ids], requires_grad=trains)
                self.register_parameter(f"{pool}_{name}", part)
        position = torch.empty(len(order), dtype=torch.int64)
        position[torch.tensor(order)] = torch.arange(len(order))
        self.register_buffer("position", position.to(gate_up.device), persistent=False)

    @property
    def num_experts(self) -> int:
        return self.position.numel()

    @property
    def pools(self) -> ExpertPools:
        return ExpertPools(self._pool("trained"), self._pool("frozen"), self.activation, self.interleaved)

    def _pool(self, pool: str) -> ExpertWeights:
        gate_up, down, *biases = (getattr(self, f"{pool}_{name}") for name in PROJECTIONS)
        return ExpertWeights(*((gate_up.mT, down.mT) if self.transposed else (gate_up, down)), *biases)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[T, D], expert ids [T, K], routing weights [T, K] -> [T, D]."""
        # Under autocast a norm hands on float32 where the weights are 16-bit, or the other way round.
        x_TD = hidden_states.to(self.trained_gate_up_proj.dtype)
        out_TD = routed_mlp(x_TD, top_k_index, top_k_weights, self.position, self.pools, self.backend, self.recompute)
        return out_TD.to(hidden_states.dtype)

    def weights_of(self, expert: int) -> list[Tensor]:
        """Detached views of one expert's weights, in the order of ``PROJECTIONS``; only two where it has no biases."""
        at, s = int(self.position[expert]), len(self.trained)
        pool, row = ("trained", at) if at < s else ("frozen", at - s)
        parts = [getattr(self, f"{pool}_{name}") for name in PROJECTIONS]
        return [part.detach()[row] for part in parts if part is not None]

    def stacked(self) -> list[Tensor]:
        """Detached copies of all weights in expert-id order, laid out as they came in."""
        parts = [(getattr(self, f"trained_{name}"), getattr(self, f"frozen_{name}")) for name in PROJECTIONS]
        return [self.in_order(trained.detach(), frozen.detach()) for trained, frozen in parts if trained is not None]

    def in_order(self, trained: Tensor, frozen: Tensor) -> Tensor:
        """The rows of two pools, [S, ...] and [E - S, ...], as one new tensor [E, ...] in expert-id order."""
        ids, s = self.position.argsort().to(trained.device), len(self.trained)
        whole = trained.new_empty(self.num_experts, *trained.shape[1:])
        whole[ids[:s]], whole[ids[s:]] = trained, frozen
        return whole

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, trained={list(self.trained)}, backend={self.backend!r}"


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
        grouped = choice_TE.unflatten(1, (c.num_groups, -1))
        if c.scoring == "softmax":
            group_score = grouped.amax(dim=-1)
        else:
            group_score = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(dim=-1)
        best = group_score.topk(c.topk_group, dim=-1, sorted=False).indices
        barred = torch.ones_like(group_score, dtype=torch.bool).scatter_(1, best, False)
        return grouped.masked_fill(barred[..., None], float("-inf")).flatten(1)


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

"""The MoE modules: routed experts in two pools, and the slim whole DeepSeekMoE block."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from esft_kernels.activation import SWIGLU, Activation
from esft_kernels.compiled_op import routed_mlp
from esft_kernels.pools import ExpertPools, ExpertWeights
from esft_kernels.routing import expert_order

PROJECTIONS = ("gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias")


class Experts(nn.Module):
    """The routed experts of one layer: a trained pool that gets gradients and a frozen pool that does not.

    Called like the experts submodule of a transformers model, ``experts(x_TD, top_k_index_TK, top_k_weights_TK)``.

    Args:
        gate_up: [E, G, D] gate and up projections, G = 2F; of experts without a gate the up projections, G = F.
        down: [E, D, F] down projections.
        trained: ids of the experts to train, in any order; they become the first rows of the trained pool.
        backend: one of ``esft_kernels.BACKENDS``.
        recompute: one of ``esft_kernels.RECOMPUTE``.
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
        self.stock_names: tuple[str, ...] = ()  # what the module in whose place this is calls its parameters
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

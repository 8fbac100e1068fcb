"""The two pools of expert weights: trained and frozen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from esft_kernels.activation import SWIGLU, Activation
from esft_kernels.routing import expert_order


@dataclass(frozen=True)
class ExpertWeights:
    """Stacked weights of some experts, or, from ``ExpertPools.at``, of one (without the first dimension).

    G is 2F for gated experts, F for others. Strides are free, so the transpose of a [E, D, G] tensor is a view.
    """

    gate_up_EGD: Tensor
    down_EDF: Tensor
    gate_up_bias_EG: Tensor | None = None
    down_bias_ED: Tensor | None = None

    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.gate_up_EGD, self.down_EDF, self.gate_up_bias_EG, self.down_bias_ED


@dataclass(frozen=True)
class ExpertPools:
    """One layer's experts, split into the trained pool (S) and the frozen pool (R = E - S).

    A pool may hold no expert (first dimension 0). All tensors share one dtype and one device; both pools have biases
    or neither has. The rows of ``gate_up`` are all gates before all ups, or (gate, up) in turn when ``interleaved``.
    """

    trained: ExpertWeights
    frozen: ExpertWeights
    activation: Activation = SWIGLU
    interleaved: bool = False

    @property
    def num_trained(self) -> int:
        return self.trained.gate_up_EGD.shape[0]

    @property
    def num_experts(self) -> int:
        return self.num_trained + self.frozen.gate_up_EGD.shape[0]

    @property
    def hidden_size(self) -> int:
        return self.trained.gate_up_EGD.shape[2]

    @property
    def intermediate_size(self) -> int:
        return self.trained.down_EDF.shape[2]

    @property
    def gate_up_size(self) -> int:
        """G, the columns of H."""
        return self.intermediate_size * self.activation.width

    def at(self, position: int) -> ExpertWeights:
        """Weights of the expert at this position: [G, D], [D, F], and the biases [G] and [D] or None."""
        s = self.num_trained
        pool, index = (self.trained, position) if position < s else (self.frozen, position - s)
        return ExpertWeights(*(None if t is None else t[index] for t in pool.tensors()))

    def split(self, h_NG: Tensor) -> tuple[Tensor, Tensor | None]:
        """Gate and up views of pre-activations whose columns are ordered like the rows of ``gate_up``."""
        if not self.activation.gated:
            return h_NG, None
        if self.interleaved:
            return h_NG[..., 0::2], h_NG[..., 1::2]
        gate, up = h_NG.chunk(2, dim=-1)
        return gate, up


def split_pools(
    weights: ExpertWeights, trained: Sequence[int], activation: Activation = SWIGLU, interleaved: bool = False
) -> ExpertPools:
    """Pools with copies of stacked weights, which are ordered by expert id; each lies in memory as what it is of.

    Args:
        weights: of all E experts.
        trained: ids of the trained pool, in its order.

    Raises ValueError for an id that is repeated or out of range.
    """
    order, s = expert_order(list(trained), len(weights.down_EDF)), len(trained)
    pools = (
        ExpertWeights(*(None if t is None else t[ids] for t in weights.tensors())) for ids in (order[:s], order[s:])
    )
    return ExpertPools(*pools, activation, interleaved)

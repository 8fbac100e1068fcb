"""The two pools of expert weights: trained and frozen."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ExpertPools:
    """Stacked weights of one layer's experts, split into the trained pool (S) and the frozen pool (R = E - S).

    ``gate_up`` rows 0..F-1 are the gate projection, F..2F-1 the up projection. A pool may hold no expert
    (first dimension 0). All four tensors share one dtype and one device.
    """

    trained_gate_up_SGD: Tensor
    trained_down_SDF: Tensor
    frozen_gate_up_RGD: Tensor
    frozen_down_RDF: Tensor

    @property
    def num_trained(self) -> int:
        return self.trained_gate_up_SGD.shape[0]

    @property
    def num_experts(self) -> int:
        return self.trained_gate_up_SGD.shape[0] + self.frozen_gate_up_RGD.shape[0]

    @property
    def hidden_size(self) -> int:
        return self.trained_gate_up_SGD.shape[2]

    @property
    def intermediate_size(self) -> int:
        return self.trained_down_SDF.shape[2]

    def gate_up(self, position: int) -> Tensor:
        """[2F, D] weights of the expert at this position."""
        s = self.num_trained
        return self.trained_gate_up_SGD[position] if position < s else self.frozen_gate_up_RGD[position - s]

    def down(self, position: int) -> Tensor:
        """[D, F] weights of the expert at this position."""
        s = self.num_trained
        return self.trained_down_SDF[position] if position < s else self.frozen_down_RDF[position - s]


@dataclass(frozen=True)
class Needs:
    """Which gradients a backward pass must compute."""

    x: bool
    weights: bool
    trained: bool

    @property
    def all_rows(self) -> bool:
        """Whether frozen rows take part in the backward at all."""
        return self.x or self.weights


@dataclass(frozen=True)
class Gradients:
    """What a backward pass returns; None where it was not needed."""

    x_TD: Tensor | None
    weights_TK: Tensor | None
    trained_gate_up_SGD: Tensor | None
    trained_down_SDF: Tensor | None

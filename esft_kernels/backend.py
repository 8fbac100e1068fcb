"""What a backend is: the functions that compute a layer's routed experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from esft_kernels.pools import ExpertPools, ExpertWeights
from esft_kernels.routing import Routing


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
    trained: ExpertWeights | None


class Backend(Protocol):
    """A module with these functions. What H holds between them is the backend's own affair.

    Tensors are aligned (see ``esft_kernels.autograd_op.aligned``), on one device and of one dtype, but for the routing
    weights, which may be float32.
    """

    @staticmethod
    def route(
        top_k_index_TK: Tensor,
        position: Tensor,
        num_trained: int,
        elsewhere: bool = False,
        num_positions: int | None = None,
        adapter_T: Tensor | None = None,
    ) -> Routing:
        """See ``esft_kernels.routing.route``."""
        ...

    @staticmethod
    def forward(
        x_TD: Tensor, weights_TK: Tensor, pools: ExpertPools, routing: Routing, keep_rows: int
    ) -> tuple[Tensor, Tensor]:
        """Output [T, D] of all routed experts, and the pre-activations H [keep_rows, G] of the first rows."""
        ...

    @staticmethod
    def rebuild(x_TD: Tensor, h_prefix: Tensor, pools: ExpertPools, routing: Routing) -> Tensor:
        """H of all rows, [N, G], from that of the prefix."""
        ...

    @staticmethod
    def backward(
        grad_out_TD: Tensor,
        x_TD: Tensor,
        h_NG: Tensor,
        weights_TK: Tensor,
        pools: ExpertPools,
        routing: Routing,
        needs: Needs,
    ) -> Gradients:
        """Gradients of ``forward``. Only the prefix of rows takes part when neither x nor weights need one."""
        ...

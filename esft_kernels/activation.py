"""What an expert computes between its two projections, and the derivative of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

Kind = Literal["silu", "gelu", "gelu_tanh", "relu2"]


@dataclass(frozen=True)
class Activation:
    """``A = f(gate) * (up + up_offset)`` for gated experts, ``A = f(h)`` for others; H is [.., 2F] or [.., F].

    Attributes:
        kind: f. ``silu`` is ``z * sigmoid(slope * z)``; ``gelu`` the one with erf, ``gelu_tanh`` its approximation
            (arXiv 1606.08415); ``relu2`` is ``max(z, 0) ** 2`` (arXiv 2109.08668).
        gated: whether H holds a gate and an up projection (arXiv 2002.05202).
        slope: of the sigmoid, ``silu`` only.
        limit: the gate is clamped to at most this and up to plus and minus this, before f; None for no clamp.
        up_offset: added to up. gpt-oss has slope 1.702, limit 7 and offset 1.

    Raises ValueError for a kind that is not known and for settings that would do nothing.
    """

    kind: Kind = "silu"
    gated: bool = True
    slope: float = 1.0
    limit: float | None = None
    up_offset: float = 0.0

    def __post_init__(self):
        if self.kind not in get_args(Kind):
            raise ValueError(f"activation must be one of {', '.join(get_args(Kind))}, got {self.kind!r}")
        if self.slope != 1.0 and self.kind != "silu":
            raise ValueError(f"only silu has a slope, got slope={self.slope} with {self.kind}")
        if not self.gated and (self.limit is not None or self.up_offset):
            raise ValueError("limit and up_offset belong to gated experts")
        if self.limit is not None and not self.limit > 0:
            raise ValueError(f"limit must be positive, got {self.limit}")

    @property
    def width(self) -> int:
        """Columns of H per column of A."""
        return 2 if self.gated else 1

    def forward(self, gate: Tensor, up: Tensor | None) -> Tensor:
        """A, from tensors of any one shape; ``up`` is None for experts without a gate."""
        if up is None:
            return self._value(gate)
        if self.limit is not None:
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return self._value(gate) * (up + self.up_offset if self.up_offset else up)

    def backward(self, grad_a: Tensor, gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Gradients with respect to ``gate`` and ``up``. At a clamp's edge they pass, as in torch.clamp."""
        if up is None:
            return self._pull(grad_a, gate), None
        gate_in, up_in = gate, up
        if self.limit is not None:
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        grad_up = grad_a * self._value(gate)
        grad_gate = self._pull(grad_a * (up + self.up_offset if self.up_offset else up), gate)
        if self.limit is not None:
            grad_gate, grad_up = grad_gate * (gate_in <= self.limit), grad_up * (up_in.abs() <= self.limit)
        return grad_gate, grad_up

    def forward_into(self, a: Tensor, gate: Tensor, up: Tensor | None) -> None:
        """``a = forward(gate, up)``, for plain SwiGLU without memory besides."""
        if self == SWIGLU and up is not None:
            torch.ops.aten.silu.out(gate, out=a)
            a.mul_(up)
        else:
            a.copy_(self.forward(gate, up))

    def backward_into(
        self, grad_gate: Tensor, grad_up: Tensor | None, grad_a: Tensor, gate: Tensor, up: Tensor | None
    ) -> None:
        """``grad_gate, grad_up = backward(grad_a, gate, up)``, for plain SwiGLU in the memory of ``grad_a``."""
        if self == SWIGLU and up is not None and grad_up is not None:
            torch.ops.aten.silu.out(gate, out=grad_up)
            grad_up.mul_(grad_a)
            torch.ops.aten.silu_backward.grad_input(grad_a.mul_(up), gate, grad_input=grad_gate)
            return
        for out, grad in zip((grad_gate, grad_up), self.backward(grad_a, gate, up), strict=True):
            if out is not None and grad is not None:
                out.copy_(grad)

    def _value(self, z: Tensor) -> Tensor:
        if self.kind == "relu2":
            return z.relu().square()
        if self.kind == "silu":
            return F.silu(z) if self.slope == 1.0 else z * torch.sigmoid(self.slope * z)
        return F.gelu(z, approximate=self._approximate)

    def _pull(self, grad: Tensor, z: Tensor) -> Tensor:
        """grad times the derivative of f at z."""
        if self.kind == "relu2":
            return grad * (2 * z.relu())
        if self.kind == "silu":  # z * sigmoid(s * z) is silu(s * z) / s, so its slope at z is silu's at s * z
            return torch.ops.aten.silu_backward(grad, z if self.slope == 1.0 else self.slope * z)
        return torch.ops.aten.gelu_backward(grad, z, approximate=self._approximate)

    @property
    def _approximate(self) -> str:
        return "tanh" if self.kind == "gelu_tanh" else "none"


SWIGLU = Activation()

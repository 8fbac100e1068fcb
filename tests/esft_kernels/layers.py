"""A small MoE layer to test with, its definition in plain words, and the tolerances."""

from __future__ import annotations

from dataclasses import dataclass, fields

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from esft_kernels.pools import ExpertPools
from esft_kernels.routing import Routing, expert_order, route

# fp32 differs by the order of its sums. A 16-bit result has been rounded five times at most on its way (H, A, Y and the
# output; H, dA', dH, the rows of dX and their sum), each time by eps at most: eps is the spacing at 1, so twice
# the unit roundoff, because Triton's interpreter cuts bf16 off instead of rounding it. Errors of single terms average
# out in the sums between, so five times eps of the largest element bounds the result with room to spare (seen: two).
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.bfloat16: 5 * torch.finfo(torch.bfloat16).eps,
    torch.float16: 5 * torch.finfo(torch.float16).eps,
}


def assert_close(actual: Tensor | None, expected: Tensor | None, tolerance: float) -> None:
    """Shapes equal and no element off by more than ``tolerance`` of the largest expected one; NaN fails."""
    assert (actual is None) == (expected is None)
    if actual is None or expected is None:
        return
    assert actual.shape == expected.shape
    if actual.numel():
        error = (actual.double() - expected.double()).abs().max()
        assert error <= tolerance * expected.double().abs().max(), f"off by {error}"


def poison_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that is allocated without a value holds NaN, so that reading it, or not writing it, shows."""

    def poisoned(allocate):
        def wrapper(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return wrapper

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@dataclass(frozen=True)
class Layer:
    """Weights by expert id, as a model has them, and by pool, as the kernels have them."""

    x_TD: Tensor
    grad_out_TD: Tensor
    ids_TK: Tensor
    weights_TK: Tensor
    gate_up_EGD: Tensor
    down_EDF: Tensor
    trained: list[int]

    @property
    def pools(self) -> ExpertPools:
        order, s = torch.tensor(expert_order(self.trained, len(self.down_EDF))), len(self.trained)
        gate_up, down = self.gate_up_EGD[order], self.down_EDF[order]
        return ExpertPools(gate_up[:s].clone(), down[:s].clone(), gate_up[s:].clone(), down[s:].clone())

    @property
    def routing(self) -> Routing:
        order = torch.tensor(expert_order(self.trained, len(self.down_EDF)))
        return route(self.ids_TK, torch.argsort(order), len(self.trained))

    def to(self, dtype: torch.dtype) -> Layer:
        """The same values in another dtype; routing weights stay in float32 unless the dtype is wider."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        for name in ("x_TD", "grad_out_TD", "gate_up_EGD", "down_EDF"):
            values[name] = values[name].to(dtype)
        values["weights_TK"] = values["weights_TK"].to(torch.promote_types(dtype, torch.float32))
        return Layer(**values)


def make_layer(
    tokens: int = 20, top_k: int = 3, experts: int = 6, hidden: int = 72, intermediate: int = 40,
    trained: tuple[int, ...] = (4, 1), used: tuple[int, ...] | None = None, dtype: torch.dtype = torch.float64,
) -> Layer:  # fmt: skip
    """A random layer whose tokens choose among the ``used`` experts (all of them when None), in this dtype's values."""
    candidates = torch.tensor(used or tuple(range(experts)))
    chosen = [candidates[torch.randperm(len(candidates))[:top_k]] for _ in range(tokens)]
    layer = Layer(
        x_TD=torch.randn(tokens, hidden),
        grad_out_TD=torch.randn(tokens, hidden),
        ids_TK=torch.stack(chosen) if chosen else torch.empty(0, top_k, dtype=torch.int64),
        weights_TK=torch.rand(tokens, top_k),
        gate_up_EGD=torch.randn(experts, 2 * intermediate, hidden) * hidden**-0.5,
        down_EDF=torch.randn(experts, hidden, intermediate) * intermediate**-0.5,
        trained=list(trained),
    )
    return layer.to(dtype)


def naive_moe(x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor) -> Tensor:
    """The definition: token by token, expert by expert."""
    out = 0 * x_TD  # differentiable even without a token
    gate_up, down = gate_up_EGD.unbind(), down_EDF.unbind()
    for t, (ids, weights) in enumerate(zip(ids_TK.tolist(), weights_TK, strict=True)):
        for e, weight in zip(ids, weights, strict=True):
            g, u = (gate_up[e] @ x_TD[t]).chunk(2)
            out[t] = out[t] + weight * (down[e] @ (F.silu(g) * u))
    return out

"""A small MoE layer to test with, its definition in plain words, and the tolerances."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from esft_kernels.activation import Activation
from esft_kernels.pools import PLAIN, ExpertPools, ExpertWeights, QuantizedWeights, dequantize, quantize, split_pools
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


def assert_close(actual: Tensor | None, expected: Tensor | None, tolerance: float, what: str = "a result") -> None:
    """Shapes equal and no element off by more than ``tolerance`` of the largest expected one; NaN fails."""
    assert (actual is None) == (expected is None)
    if actual is None or expected is None:
        return
    assert actual.shape == expected.shape
    if actual.numel():
        error = (actual.double() - expected.double()).abs().max()
        assert error <= tolerance * expected.double().abs().max(), f"{what} is off by {error}"


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
    gate_up_bias_EG: Tensor | None
    down_bias_ED: Tensor | None
    trained: list[int]
    activation: Activation
    interleaved: bool
    transposed: bool
    format: str = PLAIN  # of the frozen pool

    @property
    def pools(self) -> ExpertPools:
        gate_up, down = self.gate_up_EGD, self.down_EDF
        if self.transposed:  # stored as [E, D, G] and [E, F, D]
            gate_up, down = gate_up.mT.contiguous().mT, down.mT.contiguous().mT
        weights = ExpertWeights(gate_up, down, self.gate_up_bias_EG, self.down_bias_ED)
        pools = split_pools(weights, self.trained, self.activation, self.interleaved)
        if self.format == PLAIN:
            return pools
        assert isinstance(pools.frozen, ExpertWeights)
        return replace(pools, frozen=quantize(pools.frozen, self.format))  # the same codes whatever the dtype

    @property
    def routing(self) -> Routing:
        order = torch.tensor(expert_order(self.trained, len(self.down_EDF)), device=self.ids_TK.device)
        return route(self.ids_TK, torch.argsort(order), len(self.trained), elsewhere=True)

    def to(self, dtype: torch.dtype) -> Layer:
        """The same values in another dtype; routing weights stay in float32 unless the dtype is wider."""
        values = {
            field.name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
            for field in fields(self)
            if (value := getattr(self, field.name)) is not self.weights_TK
        }
        return Layer(**values, weights_TK=self.weights_TK.to(torch.promote_types(dtype, torch.float32)))

    def on(self, device: torch.device) -> Layer:
        return Layer(**{name: v.to(device) if isinstance(v, Tensor) else v for name, v in vars(self).items()})


def written_out(layer: Layer) -> Layer:
    """The layer with plain frozen weights, of the values that its own have in its dtype."""
    pools = layer.pools
    if not isinstance(pools.frozen, QuantizedWeights):
        return layer
    ids = expert_order(layer.trained, len(layer.down_EDF))[len(layer.trained) :]
    plain, gate_up, down = dequantize(pools.frozen, layer.x_TD.dtype), layer.gate_up_EGD.clone(), layer.down_EDF.clone()
    gate_up[ids], down[ids] = plain.gate_up_EGD, plain.down_EDF
    return replace(layer, gate_up_EGD=gate_up, down_EDF=down, format=PLAIN)


SILU = Activation()


def make_layer(
    tokens: int = 20, top_k: int = 3, experts: int = 6, hidden: int = 72, intermediate: int = 40,
    trained: tuple[int, ...] = (4, 1), used: tuple[int, ...] | None = None, dtype: torch.dtype = torch.float64,
    activation: Activation = SILU, interleaved: bool = False, transposed: bool = False, biased: bool = False,
    elsewhere: bool = False, format: str = PLAIN,
) -> Layer:  # fmt: skip
    """A random layer whose tokens choose among the ``used`` experts (all of them when None), in this dtype's values.

    ``elsewhere``: a third of the slots name experts that are not here.
    """
    candidates = torch.tensor(used or tuple(range(experts)))
    chosen = [candidates[torch.randperm(len(candidates))[:top_k]] for _ in range(tokens)]
    ids = torch.stack(chosen) if chosen else torch.empty(0, top_k, dtype=torch.int64)
    if elsewhere:
        ids.view(-1)[::3] = experts
    columns = intermediate * activation.width
    layer = Layer(
        x_TD=torch.randn(tokens, hidden),
        grad_out_TD=torch.randn(tokens, hidden),
        ids_TK=ids,
        weights_TK=torch.rand(tokens, top_k),
        gate_up_EGD=torch.randn(experts, columns, hidden) * hidden**-0.5,
        down_EDF=torch.randn(experts, hidden, intermediate) * intermediate**-0.5,
        gate_up_bias_EG=torch.randn(experts, columns) if biased else None,
        down_bias_ED=torch.randn(experts, hidden) if biased else None,
        trained=list(trained),
        activation=activation,
        interleaved=interleaved,
        transposed=transposed,
        format=format,
    )
    return layer.to(dtype)


def naive_moe(layer: Layer, x_TD: Tensor, weights_TK: Tensor, gate_up_EGD, down_EDF, gate_up_bias=None, down_bias=None):
    """The definition: token by token, expert by expert; differentiable."""
    out = 0 * x_TD  # differentiable even without a token
    gate_up, down = gate_up_EGD.unbind(), down_EDF.unbind()
    for t, (ids, weights) in enumerate(zip(layer.ids_TK.tolist(), weights_TK, strict=True)):
        for e, weight in zip(ids, weights, strict=True):
            if e >= len(down):  # not here
                continue
            h = gate_up[e] @ x_TD[t]
            if gate_up_bias is not None:
                h = h + gate_up_bias[e]
            y = down[e] @ naive_activation(layer.activation, h, layer.interleaved)
            if down_bias is not None:
                y = y + down_bias[e]
            out[t] = out[t] + weight * y
    return out


def naive_activation(activation: Activation, h: Tensor, interleaved: bool) -> Tensor:
    def f(z: Tensor) -> Tensor:
        if activation.kind == "silu":
            return z * torch.sigmoid(activation.slope * z)
        if activation.kind == "relu2":
            return torch.relu(z) ** 2
        return F.gelu(z, approximate="tanh" if activation.kind == "gelu_tanh" else "none")

    if not activation.gated:
        return f(h)
    gate, up = (h[0::2], h[1::2]) if interleaved else h.chunk(2)
    if activation.limit is not None:
        gate, up = gate.clamp(max=activation.limit), up.clamp(-activation.limit, activation.limit)
    return f(gate) * (up + activation.up_offset)


GPT_OSS = Activation(slope=1.702, limit=0.8, up_offset=1.0)  # a limit that random numbers reach
ACTIVATIONS = {
    "silu": Activation(), "gelu": Activation("gelu"), "gelu_tanh": Activation("gelu_tanh"), "gpt-oss": GPT_OSS,
    "clamped": Activation(limit=0.5), "relu2": Activation("relu2", gated=False), "plain": Activation("gelu", False),
}  # fmt: skip


def h_columns(pools: ExpertPools) -> Tensor:
    """int64 [G]: which row of gate_up makes each column of the H of the Triton kernels."""
    g, f = torch.arange(pools.gate_up_size), pools.intermediate_size
    return g % 2 * f + g // 2 if pools.activation.gated and not pools.interleaved else g


def watch_calls(monkeypatch: pytest.MonkeyPatch, backend: ModuleType) -> dict[str, list[tuple]]:
    """The arguments of every call of a backend's functions from now on, by the function's name."""
    seen: dict[str, list[tuple]] = {"forward": [], "rebuild": [], "backward": []}

    def watch(name: str) -> None:
        real = getattr(backend, name)
        monkeypatch.setattr(backend, name, lambda *args: seen[name].append(args) or real(*args))

    for name in seen:
        watch(name)
    return seen


def numbered_weights(experts: int, first: int, columns: int = 10, biased: bool = True) -> ExpertWeights:
    """[experts, columns, 3] and [experts, 3, 5]: values that say which expert, counted from ``first``, and tensor."""

    def filled(tensor: int, *shape: int) -> Tensor:
        numbers = 10.0 * torch.arange(first, first + experts) + tensor
        return numbers.view(-1, *[1] * len(shape)).expand(experts, *shape)

    biases = (filled(2, columns), filled(3, 3)) if biased else ()
    return ExpertWeights(filled(0, columns, 3), filled(1, 3, 5), *biases)

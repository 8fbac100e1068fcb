"""The one differentiable op: all routed experts forward, weight gradients for the trained pool only."""

from __future__ import annotations

import importlib
import os
from types import ModuleType

import torch
from torch import Tensor

from .pools import ExpertPools, Needs
from .routing import Routing

BACKENDS = ("auto", "triton", "cpu", "reference")


def resolve_backend(backend: str, device: torch.device) -> ModuleType:
    """The module that computes ``forward`` and ``backward`` on this device.

    ``auto`` is Triton on a GPU and the CPU path elsewhere. Raises ValueError for a name that is not a backend
    and for a backend that cannot run on the device.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "auto":
        backend = "cpu" if device.type == "cpu" else "triton"
    if backend == "cpu" and device.type != "cpu":
        raise ValueError(f"backend 'cpu' computes on CPU tensors, got tensors on {device}")
    if backend == "triton":
        if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError("backend 'triton' on CPU tensors needs TRITON_INTERPRET=1 set before Python starts")
        try:
            return importlib.import_module(".triton_backend", __package__)
        except ModuleNotFoundError as error:
            if error.name != "triton":
                raise
            raise ValueError("backend 'triton' needs the triton package, which is not installed here") from error
    return importlib.import_module(f".{backend}", __package__)


class _ExpertMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weights, trained_gate_up, trained_down, frozen_gate_up, frozen_down, routing, backend):  # pyright: ignore[reportIncompatibleMethodOverride]
        pools = ExpertPools(trained_gate_up, trained_down, frozen_gate_up, frozen_down)
        out, h = backend.forward(x, weights, pools, routing)
        needs = Needs(
            x=ctx.needs_input_grad[0],
            weights=ctx.needs_input_grad[1],
            trained=ctx.needs_input_grad[2] or ctx.needs_input_grad[3],
        )
        if not needs.all_rows:  # only the prefix will be read again; a copy lets the rest go
            h = h[: routing.prefix_rows()].clone()
        ctx.save_for_backward(
            x, weights, h, trained_gate_up, trained_down, frozen_gate_up, frozen_down,
            routing.token_N, routing.slot_N, routing.row_TK, routing.offsets_E1,
        )  # fmt: skip
        ctx.needs, ctx.num_trained, ctx.backend = needs, routing.num_trained, backend
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weights, h, gate_up, down, frozen_gate_up, frozen_down, *routing = ctx.saved_tensors
        pools = ExpertPools(gate_up, down, frozen_gate_up, frozen_down)
        grads = ctx.backend.backward(
            grad_out.contiguous(), x, h, weights, pools, Routing(*routing, ctx.num_trained), ctx.needs
        )
        return (
            grads.x_TD, grads.weights_TK, grads.trained_gate_up_SGD, grads.trained_down_SDF,
            None, None, None, None,
        )  # fmt: skip


def expert_mlp(x_TD: Tensor, weights_TK: Tensor, pools: ExpertPools, routing: Routing, backend: str = "auto") -> Tensor:
    """Weighted sum over each token's K experts of ``down(silu(gate(x)) * up(x))``.

    Args:
        x_TD: [T, D] in the pools' dtype.
        weights_TK: [T, K] routing weights, float32 or the pools' dtype.
        pools: the experts' weights; only the trained pool can get a gradient.
        routing: from ``route``, with the same S as the pools.
        backend: one of ``BACKENDS``.

    Returns [T, D] in the dtype of x. Differentiable once with respect to x, the routing weights and the trained
    pool. Saved for the backward: x, the pre-activations H [N, 2F] (the prefix of it when neither x nor the
    weights need a gradient) and the routing; nothing else.

    Raises ValueError naming the argument that does not fit.
    """
    _validate(x_TD, weights_TK, pools, routing)
    module = resolve_backend(backend, x_TD.device)
    x_TD, weights_TK = x_TD.contiguous(), weights_TK.contiguous()
    tensors = (pools.trained_gate_up_SGD, pools.trained_down_SDF, pools.frozen_gate_up_RGD, pools.frozen_down_RDF)
    if not torch.is_grad_enabled() or not any(t.requires_grad for t in (x_TD, weights_TK, *tensors)):
        return module.forward(x_TD, weights_TK, pools, routing)[0]
    return _ExpertMLP.apply(x_TD, weights_TK, *tensors, routing, module)  # pyright: ignore[reportReturnType]


def _validate(x_TD: Tensor, weights_TK: Tensor, pools: ExpertPools, routing: Routing) -> None:
    d, f = pools.hidden_size, pools.intermediate_size
    s, r = pools.num_trained, pools.num_experts - pools.num_trained
    expected = {
        "trained_gate_up": (pools.trained_gate_up_SGD, (s, 2 * f, d)),
        "trained_down": (pools.trained_down_SDF, (s, d, f)),
        "frozen_gate_up": (pools.frozen_gate_up_RGD, (r, 2 * f, d)),
        "frozen_down": (pools.frozen_down_RDF, (r, d, f)),
        "x": (x_TD, (routing.num_tokens, d)),
    }
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
        if tensor.dtype != x_TD.dtype or tensor.device != x_TD.device:
            raise ValueError(
                f"{name} must be {x_TD.dtype} on {x_TD.device} like x, got {tensor.dtype} on {tensor.device}"
            )
    for name in ("gate_up", "down"):
        trained, frozen = expected[f"trained_{name}"][0], expected[f"frozen_{name}"][0]
        if s and r and trained.stride() != frozen.stride():
            raise ValueError(
                f"trained_{name} and frozen_{name} must have the same strides, "
                f"got {trained.stride()} and {frozen.stride()}"
            )
    if tuple(weights_TK.shape) != tuple(routing.row_TK.shape):
        raise ValueError(
            f"routing weights must have shape {tuple(routing.row_TK.shape)}, got {tuple(weights_TK.shape)}"
        )
    if pools.frozen_gate_up_RGD.requires_grad or pools.frozen_down_RDF.requires_grad:
        raise ValueError("the frozen pool cannot require a gradient")
    if routing.num_experts != pools.num_experts or routing.num_trained != s:
        raise ValueError(
            f"routing is for {routing.num_trained} trained of {routing.num_experts} experts, "
            f"the pools hold {s} of {pools.num_experts}"
        )

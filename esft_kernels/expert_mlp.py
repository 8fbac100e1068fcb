"""The one differentiable op: all routed experts forward, weight gradients for the trained pool only."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from .activation import Activation
from .pools import ExpertPools, ExpertWeights, Needs
from .routing import Routing

BACKENDS = ("auto", "triton", "cpu", "cpu_packed", "reference")
RECOMPUTE = ("none", "frozen")
ALIGNMENT = 16  # bytes, of the widest load


def resolve_backend(backend: str, device: torch.device) -> ModuleType:
    """The module that computes ``forward`` and ``backward`` on this device.

    ``auto`` is Triton on a GPU and the CPU path elsewhere; ``cpu_packed`` is a faster CPU path that takes three times
    the frozen weights' memory. Raises ValueError for a name that is not a backend and for a backend that cannot run on
    the device.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "auto":
        backend = "cpu" if device.type == "cpu" else "triton"
    if backend.startswith("cpu") and device.type != "cpu":
        raise ValueError(f"backend {backend!r} computes on CPU tensors, got tensors on {device}")
    if backend == "cpu_packed" and not torch.backends.mkldnn.is_available():
        raise ValueError("backend 'cpu_packed' needs a PyTorch with oneDNN, which this one is not")
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
    def forward(ctx, x, weights, routing, layout, backend, recompute, *tensors):  # pyright: ignore[reportIncompatibleMethodOverride]
        pools = _pools(layout, tensors)
        ctx.needs = Needs(
            x=ctx.needs_input_grad[0], weights=ctx.needs_input_grad[1], trained=any(ctx.needs_input_grad[6:10])
        )
        # Without gradients for x and the routing weights, the backward reads the prefix only.
        keep_all = ctx.needs.all_rows and recompute == "none"
        out, h = backend.forward(x, weights, pools, routing, routing.num_rows if keep_all else routing.prefix_rows())
        ctx.save_for_backward(
            x, weights, h, routing.token_N, routing.slot_N, routing.row_TK, routing.offsets_E1, *tensors
        )
        ctx.num_trained, ctx.layout, ctx.backend = routing.num_trained, layout, backend
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weights, h, *saved = ctx.saved_tensors
        routing, pools, needs = Routing(*saved[:4], ctx.num_trained), _pools(ctx.layout, saved[4:]), ctx.needs
        if needs.all_rows and h.shape[0] < routing.num_rows:
            h = ctx.backend.rebuild(x, h, pools, routing)
        grads = ctx.backend.backward(aligned(grad_out), x, h, weights, pools, routing, needs)
        trained = grads.trained.tensors() if grads.trained is not None else (None,) * 4
        return grads.x_TD, grads.weights_TK, None, None, None, None, *trained, None, None, None, None


def _pools(layout: tuple[Activation, bool], tensors: Sequence[Tensor]) -> ExpertPools:
    return ExpertPools(ExpertWeights(*tensors[:4]), ExpertWeights(*tensors[4:]), *layout)


def expert_mlp(
    x_TD: Tensor,
    weights_TK: Tensor,
    pools: ExpertPools,
    routing: Routing,
    backend: str = "auto",
    recompute: str = "none",
) -> Tensor:
    """Weighted sum over each token's K experts of ``down(activation(gate_up(x)))``.

    Args:
        x_TD: [T, D] in the pools' dtype.
        weights_TK: [T, K] routing weights, float32 or the pools' dtype.
        pools: the experts' weights; only the trained pool can get a gradient.
        routing: from ``route``, with the same S as the pools.
        backend: one of ``BACKENDS``.
        recompute: ``frozen`` keeps the pre-activations of the trained experts' rows only, and makes the others again
            in the backward: one more up projection of the frozen rows for most of the memory.

    Returns [T, D] in the dtype of x. Differentiable once with respect to x, the routing weights and the trained
    pool. Saved for the backward: x, the pre-activations H [N, G] (the prefix of it with ``recompute="frozen"``, and
    when neither x nor the weights need a gradient) and the routing; nothing else. Keeping the prefix waits for the
    device once, to learn how long it is.

    Raises ValueError naming the argument that does not fit.
    """
    _validate(x_TD, weights_TK, pools, routing)
    if recompute not in RECOMPUTE:
        raise ValueError(f"recompute must be one of {', '.join(RECOMPUTE)}, got {recompute!r}")
    module = resolve_backend(backend, x_TD.device)
    x_TD, weights_TK = aligned(x_TD), aligned(weights_TK)
    tensors = (*pools.trained.tensors(), *pools.frozen.tensors())
    if not torch.is_grad_enabled() or not any(t is not None and t.requires_grad for t in (x_TD, weights_TK, *tensors)):
        return module.forward(x_TD, weights_TK, pools, routing, 0)[0]
    layout = (pools.activation, pools.interleaved)
    return _ExpertMLP.apply(x_TD, weights_TK, routing, layout, module, recompute, *tensors)  # pyright: ignore[reportReturnType]


def aligned(tensor: Tensor) -> Tensor:
    """Contiguous, and at an address that vector loads can start from; a copy where it is not."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()


def _validate(x_TD: Tensor, weights_TK: Tensor, pools: ExpertPools, routing: Routing) -> None:
    for name, tensor in (("gate_up", pools.trained.gate_up_EGD), ("down", pools.trained.down_EDF)):
        if not isinstance(tensor, Tensor) or tensor.dim() != 3:
            found = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"trained_{name} must be a stack of matrices, got {found}")
    if not x_TD.is_floating_point():
        raise ValueError(f"x must be of a float dtype, got {x_TD.dtype}")
    d, f, g = pools.hidden_size, pools.intermediate_size, pools.gate_up_size
    sizes = {"trained": pools.num_trained, "frozen": pools.num_experts - pools.num_trained}
    expected: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {}
    for pool, n in sizes.items():
        shapes = {"gate_up": (n, g, d), "down": (n, d, f), "gate_up_bias": (n, g), "down_bias": (n, d)}
        tensors = getattr(pools, pool).tensors()
        expected |= {f"{pool}_{name}": (t, shapes[name]) for name, t in zip(shapes, tensors, strict=True)}
    expected["x"] = (x_TD, (routing.num_tokens, d))
    if len({tensor is None for name, (tensor, _) in expected.items() if name.endswith("bias")}) > 1:
        raise ValueError("biases must be given for both projections of both pools, or not at all")
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
        if tensor.dtype != x_TD.dtype or tensor.device != x_TD.device:
            raise ValueError(
                f"{name} must be {x_TD.dtype} on {x_TD.device} like x, got {tensor.dtype} on {tensor.device}"
            )
        if name.endswith("bias") and not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")
        if tensor.device.type != "cpu" and name != "x" and tensor.data_ptr() % ALIGNMENT:
            raise ValueError(f"{name} must start at a multiple of {ALIGNMENT} bytes, got {tensor.data_ptr():#x}")
        # The kernels reach into one expert with 32-bit offsets.
        if sum((size - 1) * stride for size, stride in zip(shape[1:], tensor.stride()[1:], strict=True)) >= 2**31:
            raise ValueError(f"{name} must hold an expert within 2**31 elements, got strides {tensor.stride()}")
    if all(sizes.values()):
        for name in ("gate_up", "down"):
            trained, frozen = (expected[f"{pool}_{name}"][0] for pool in sizes)
            if trained is not None and frozen is not None and trained.stride() != frozen.stride():
                raise ValueError(
                    f"trained_{name} and frozen_{name} must have the same strides, "
                    f"got {trained.stride()} and {frozen.stride()}"
                )
    if tuple(weights_TK.shape) != tuple(routing.row_TK.shape):
        raise ValueError(
            f"routing weights must have shape {tuple(routing.row_TK.shape)}, got {tuple(weights_TK.shape)}"
        )
    if weights_TK.device != x_TD.device or not weights_TK.is_floating_point():
        raise ValueError(
            f"routing weights must be floats on {x_TD.device} like x, got {weights_TK.dtype} on {weights_TK.device}"
        )
    if routing.token_N.device != x_TD.device:
        raise ValueError(f"routing must be on {x_TD.device} like x, got {routing.token_N.device}")
    if any(t is not None and t.requires_grad for t in pools.frozen.tensors()):
        raise ValueError("the frozen pool cannot require a gradient")
    if routing.num_experts != pools.num_experts or routing.num_trained != pools.num_trained:
        raise ValueError(
            f"routing is for {routing.num_trained} trained of {routing.num_experts} experts, "
            f"the pools hold {pools.num_trained} of {pools.num_experts}"
        )

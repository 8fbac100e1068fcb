"""The one differentiable op: all routed experts forward, weight gradients for the trained pool only."""

from __future__ import annotations

import torch
from torch import Tensor

from esft_kernels.backend import Backend, Needs
from esft_kernels.backends.resolve import resolve_backend
from esft_kernels.pools import PLAIN, ExpertPools, QuantizedWeights, pools_of
from esft_kernels.routing import Routing

RECOMPUTE = ("none", "frozen")
ALIGNMENT = 16  # bytes, of the widest load


def run_forward(
    x_TD: Tensor, weights_TK: Tensor, pools: ExpertPools, routing: Routing, backend: Backend, keep: str
) -> tuple[Tensor, Tensor]:
    """The output, and for the backward H of ``keep``: "all" rows of experts here, the "prefix" or "none"."""
    rows = 0 if keep == "none" else routing.rows_here() if keep == "all" else routing.prefix_rows()
    return backend.forward(aligned(x_TD), aligned(weights_TK), pools, routing, rows)


def run_backward(
    grad_out_TD: Tensor,
    x_TD: Tensor,
    weights_TK: Tensor,
    h_NG: Tensor,
    pools: ExpertPools,
    routing: Routing,
    backend: Backend,
    needs: Needs,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, the routing weights and the trained pool's four tensors, None where there is none."""
    if not needs.all_rows and not routing.num_trained:  # of a rank that holds none of what trains
        return None, None, *(None if t is None else torch.empty_like(t) for t in pools.trained.tensors())
    x_TD, weights_TK = aligned(x_TD), aligned(weights_TK)
    if needs.all_rows and h_NG.shape[0] < routing.rows_here():
        h_NG = backend.rebuild(x_TD, h_NG, pools, routing)
    grads = backend.backward(aligned(grad_out_TD), x_TD, h_NG, weights_TK, pools, routing, needs)
    return grads.x_TD, grads.weights_TK, *(grads.trained.tensors() if grads.trained is not None else (None,) * 4)


def rows_to_keep(needs: Needs, recompute: str) -> str:
    """Of which rows the backward wants H; without gradients for x and the routing weights it reads the prefix only."""
    return "all" if needs.all_rows and recompute == "none" else "prefix" if needs.all_rows or needs.trained else "none"


class _ExpertMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weights, routing, layout, backend, recompute, *tensors):  # pyright: ignore[reportIncompatibleMethodOverride]
        pools, wanted = pools_of(tensors, *layout), ctx.needs_input_grad
        ctx.needs = Needs(x=wanted[0], weights=wanted[1], trained=any(wanted[6:10]))
        out, h = run_forward(x, weights, pools, routing, backend, rows_to_keep(ctx.needs, recompute))
        ctx.save_for_backward(
            x, weights, h, routing.token_N, routing.slot_N, routing.row_TK, routing.offsets_E1, *tensors
        )
        ctx.pools_of_rows, ctx.layout, ctx.backend = (routing.num_trained, routing.elsewhere), layout, backend
        ctx.num_frozen_tensors = len(tensors) - 4
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weights, h, *saved = ctx.saved_tensors
        routing, pools = Routing(*saved[:4], *ctx.pools_of_rows), pools_of(saved[4:], *ctx.layout)
        grad_x, grad_weights, *trained = run_backward(grad_out, x, weights, h, pools, routing, ctx.backend, ctx.needs)
        return grad_x, grad_weights, None, None, None, None, *trained, *(None,) * ctx.num_frozen_tensors


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
    tensors = pools.tensors()
    if not torch.is_grad_enabled() or not any(t is not None and t.requires_grad for t in (x_TD, weights_TK, *tensors)):
        return module.forward(x_TD, weights_TK, pools, routing, 0)[0]
    layout = (pools.activation, pools.interleaved, pools.format)
    return _ExpertMLP.apply(x_TD, weights_TK, routing, layout, module, recompute, *tensors)  # pyright: ignore[reportReturnType]


def aligned(tensor: Tensor) -> Tensor:
    """Contiguous, and at an address that vector loads can start from; a copy where it is not."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()


_fitting: set[tuple] = set()  # what ``_looks`` of pools in which no fault was found; layers are of few kinds


def _validate(x_TD: Tensor, weights_TK: Tensor, pools: ExpertPools, routing: Routing) -> None:
    if not x_TD.is_floating_point():
        raise ValueError(f"x must be of a float dtype, got {x_TD.dtype}")
    looks = _looks(pools, x_TD.dtype, x_TD.device)
    if looks not in _fitting:
        _validate_pools(pools, x_TD.dtype, x_TD.device)
        _fitting.add(looks)
    if x_TD.shape != (routing.num_tokens, pools.hidden_size):
        expected = (routing.num_tokens, pools.hidden_size)
        raise ValueError(f"x must have shape {expected}, got {tuple(x_TD.shape)}")
    if weights_TK.shape != routing.row_TK.shape:
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


def _looks(pools: ExpertPools, dtype: torch.dtype, device: torch.device) -> tuple:
    """All that ``_validate_pools`` looks at, for it takes longer than a launch and a step asks in every layer."""
    frozen, on_cpu = pools.frozen, device.type == "cpu"
    quantized = (frozen.format, frozen.shape, len(frozen.gate_up)) if isinstance(frozen, QuantizedWeights) else None
    tensors = (
        (t.shape, t.stride(), t.dtype, t.device, on_cpu or t.data_ptr() % ALIGNMENT)
        if isinstance(t, Tensor)
        else type(t)
        for t in pools.tensors()
    )
    return dtype, device, pools.activation.width, quantized, *tensors


def _validate_pools(pools: ExpertPools, dtype: torch.dtype, device: torch.device) -> None:
    for name, tensor in (("gate_up", pools.trained.gate_up_EGD), ("down", pools.trained.down_EDF)):
        if not isinstance(tensor, Tensor) or tensor.dim() != 3:
            found = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"trained_{name} must be a stack of matrices, got {found}")
    d, f, g = pools.hidden_size, pools.intermediate_size, pools.gate_up_size
    sizes = {"trained": pools.num_trained, "frozen": pools.num_experts - pools.num_trained}
    expected: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {}
    for pool, n in sizes.items():
        shapes = {"gate_up": (n, g, d), "down": (n, d, f), "gate_up_bias": (n, g), "down_bias": (n, d)}
        held = getattr(pools, pool)
        if isinstance(held, QuantizedWeights):
            _validate_quantized(held, shapes["gate_up"], shapes["down"], device)
            shapes = {name: shape for name, shape in shapes.items() if name.endswith("bias")}
        tensors = held.tensors()[-len(shapes) :]
        expected |= {f"{pool}_{name}": (t, shapes[name]) for name, t in zip(shapes, tensors, strict=True)}
    if len({tensor is None for name, (tensor, _) in expected.items() if name.endswith("bias")}) > 1:
        raise ValueError("biases must be given for both projections of both pools, or not at all")
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
        if tensor.dtype != dtype or tensor.device != device:
            raise ValueError(f"{name} must be {dtype} on {device} like x, got {tensor.dtype} on {tensor.device}")
        if name.endswith("bias") and not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")
        if device.type != "cpu" and tensor.data_ptr() % ALIGNMENT:
            raise ValueError(f"{name} must start at a multiple of {ALIGNMENT} bytes, got {tensor.data_ptr():#x}")
        # The kernels reach into one expert with 32-bit offsets.
        if sum((size - 1) * stride for size, stride in zip(shape[1:], tensor.stride()[1:], strict=True)) >= 2**31:
            raise ValueError(f"{name} must hold an expert within 2**31 elements, got strides {tensor.stride()}")
    if all(sizes.values()) and pools.format == PLAIN:
        for name in ("gate_up", "down"):
            trained, frozen = (expected[f"{pool}_{name}"][0] for pool in sizes)
            if trained is not None and frozen is not None and trained.stride() != frozen.stride():
                raise ValueError(
                    f"trained_{name} and frozen_{name} must have the same strides, "
                    f"got {trained.stride()} and {frozen.stride()}"
                )


def _validate_quantized(
    pool: QuantizedWeights, gate_up: tuple[int, ...], down: tuple[int, ...], device: torch.device
) -> None:
    for projection, shape in (("gate_up", gate_up), ("down", down)):
        name, stack = f"frozen_{projection}", pool.stack(projection)
        if pool.size(projection) != shape[1:]:
            raise ValueError(f"{name} must have shape {shape}, got {(pool.num_experts, *pool.size(projection))}")
        pool.kind.check(stack, *shape, name)
        if pool.kind.buffer_size(*pool.size(projection)) >= 2**31:
            raise ValueError(f"{name} must hold an expert within 2**31 elements, got {shape[1:]}")
        for part, tensor in zip(pool.kind.layout(*shape), stack, strict=True):
            if tensor.device != device:
                raise ValueError(f"{name} {part} must be on {device} like x, got {tensor.device}")
            if device.type != "cpu" and tensor.data_ptr() % ALIGNMENT:
                raise ValueError(f"{name} {part} must start at a multiple of {ALIGNMENT} bytes")

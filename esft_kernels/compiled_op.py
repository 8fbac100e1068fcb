"""Routing and experts together, and as one opaque node where torch.compile traces.

``expert_mlp`` is what runs; inside a compiled graph it stands behind a custom operator, because the lengths of its
parts depend on the data, and a compiler that looked in would only break the graph there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from esft_kernels.activation import Activation
from esft_kernels.autograd_op import expert_mlp, rows_to_keep, run_backward, run_forward
from esft_kernels.backend import Needs
from esft_kernels.backends.resolve import resolve_backend
from esft_kernels.pools import ExpertPools, pools_of
from esft_kernels.routing import Routing

_TRAINED = "Tensor gate_up, Tensor down, Tensor? gate_up_bias, Tensor? down_bias"
_POOLS = f"{_TRAINED}, Tensor[] frozen, Tensor? frozen_gate_up_bias, Tensor? frozen_down_bias"
_ACTIVATION = "str kind, bool gated, float slope, float? limit, float up_offset"
_SETTINGS = f"{_ACTIVATION}, bool interleaved, str format, str backend, bool elsewhere"
_CHOICE = "Tensor index, Tensor weights, Tensor position, Tensor? adapter"
_ROUTING = "Tensor token_N, Tensor slot_N, Tensor row_TK, Tensor offsets_E1"
_POOL_ARGUMENTS, _NUM_SETTINGS = 7, 9


def routed_mlp(
    x_TD: Tensor,
    top_k_index_TK: Tensor,
    weights_TK: Tensor,
    position: Tensor,
    pools: ExpertPools,
    backend: str = "auto",
    recompute: str = "none",
    elsewhere: bool = False,
    adapter_T: Tensor | None = None,
) -> Tensor:
    """``expert_mlp`` of a top-k choice: see there, and ``route``, for the arguments and the errors."""
    if not torch.compiler.is_compiling():
        module = resolve_backend(backend, x_TD.device)
        routing = module.route(top_k_index_TK, position, pools.num_trained, elsewhere, pools.num_experts, adapter_T)
        return expert_mlp(x_TD, weights_TK, pools, routing, backend, recompute)
    a = pools.activation
    settings = (a.kind, a.gated, a.slope, a.limit, a.up_offset, pools.interleaved, pools.format, backend, elsewhere)
    *frozen, gate_up_bias, down_bias = pools.frozen.tensors()
    tensors = (*pools.trained.tensors(), frozen, gate_up_bias, down_bias)
    trains = any(t is not None and t.requires_grad for t in pools.trained.tensors())
    needs = Needs(
        *(torch.is_grad_enabled() and want for want in (x_TD.requires_grad, weights_TK.requires_grad, trains))
    )
    keep = rows_to_keep(needs, recompute)
    choice = (top_k_index_TK, weights_TK, position, adapter_T)
    return torch.ops.esft.routed_mlp(x_TD, *choice, *tensors, *settings, keep)[0]


def _pools(tensors: tuple, settings: tuple) -> ExpertPools:
    *activation, interleaved, format, _, _ = settings
    *trained, frozen, gate_up_bias, down_bias = tensors
    return pools_of((*trained, *frozen, gate_up_bias, down_bias), Activation(*activation), interleaved, format)


@torch.library.custom_op(
    "esft::routed_mlp",
    mutates_args=(),
    schema=f"(Tensor x, {_CHOICE}, {_POOLS}, {_SETTINGS}, str keep)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _forward(x, index, weights, position, adapter, *rest):
    """The output [T, D], and for the backward H (all rows, the prefix or none) and the routing."""
    tensors, settings, keep = rest[:_POOL_ARGUMENTS], rest[_POOL_ARGUMENTS:-1], rest[-1]
    pools = _pools(tensors, settings)
    backend = resolve_backend(settings[-2], x.device)
    routing = backend.route(index, position, pools.num_trained, settings[-1], pools.num_experts, adapter)
    out, h = run_forward(x, weights, pools, routing, backend, keep)
    return out, h, routing.token_N, routing.slot_N, routing.row_TK, routing.offsets_E1


@_forward.register_fake
def _(x, index, weights, position, adapter, *rest):
    n, columns, positions = (
        index.numel(),
        rest[0].shape[1],
        _pools(rest[:_POOL_ARGUMENTS], rest[_POOL_ARGUMENTS:-1]).num_experts,
    )
    keep, elsewhere = rest[-1], rest[-2]
    known = {"none": 0} if elsewhere else {"all": n, "none": 0}
    rows = known[keep] if keep in known else torch.library.get_ctx().new_dynamic_size()
    long = [index.new_empty(shape, dtype=torch.int64) for shape in ((n,), (n,), index.shape, (positions + 1,))]
    return torch.empty_like(x, memory_format=torch.contiguous_format), x.new_empty(rows, columns), *long


@torch.library.custom_op(
    "esft::routed_mlp_backward",
    mutates_args=(),
    schema=f"(Tensor grad_out, Tensor x, Tensor weights, Tensor h, {_ROUTING}, {_POOLS}, {_SETTINGS}, bool[] needs)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _backward(grad_out, x, weights, h, token, slot, row, offsets, *rest):
    """Gradients of x, the routing weights and the trained pool; without elements where they are not needed."""
    tensors, settings, needs = rest[:_POOL_ARGUMENTS], rest[_POOL_ARGUMENTS:-1], Needs(*rest[-1])
    pools = _pools(tensors, settings)
    routing = Routing(token, slot, row, offsets, pools.num_trained, settings[-1])
    backend = resolve_backend(settings[-2], x.device)
    found = run_backward(grad_out, x, weights, h, pools, routing, backend, needs)
    # As the compiler was told: in the inputs' strides, whatever the backend gives them.
    inputs = (x.contiguous(), weights.contiguous(), *tensors[:4])
    return tuple(
        x.new_empty(0) if g is None else torch.empty_like(i).copy_(g) if g.stride() != i.stride() else g
        for g, i in zip(found, inputs, strict=True)
    )


@_backward.register_fake
def _(grad_out, x, weights, h, token, slot, row, offsets, *rest):
    needs = Needs(*rest[-1])
    contiguous = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, weights)]
    wanted = (needs.x, needs.weights, *(needs.trained and t is not None for t in rest[:4]))
    inputs = (*contiguous, *rest[:4])
    return tuple(torch.empty_like(t) if want else x.new_empty(0) for t, want in zip(inputs, wanted, strict=True))


def _setup_context(ctx, inputs, output):
    x, _, weights, _, _, *rest = inputs
    *trained, frozen, gate_up_bias, down_bias = rest[:_POOL_ARGUMENTS]
    ctx.save_for_backward(x, weights, *output[1:], *trained, gate_up_bias, down_bias, *frozen)
    ctx.settings = rest[_POOL_ARGUMENTS:-1]
    ctx.set_materialize_grads(False)


def _gradients(ctx, grad_out, *_):
    needs = ctx.needs_input_grad
    flags = [needs[0], needs[2], any(needs[5:9])]
    # x, the routing weights, H, the routing's four and the trained pool's four; then the frozen pool's.
    every = ctx.saved_tensors  # once: a layer that is made again in the backward gives them out no second time
    saved, biases, frozen = every[:11], every[11:13], list(every[13:])
    grads = torch.ops.esft.routed_mlp_backward(grad_out, *saved, frozen, *biases, *ctx.settings, flags)
    wanted = (needs[0], needs[2], *needs[5:9])
    x, weights, *trained = (g if need else None for g, need in zip(grads, wanted, strict=True))
    return x, None, weights, None, None, *trained, [None] * len(frozen), *(None,) * (2 + _NUM_SETTINGS + 1)


torch.library.register_autograd("esft::routed_mlp", _gradients, setup_context=_setup_context)

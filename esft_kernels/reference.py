"""Plain PyTorch twin of every op: slow, obvious, and exact enough to run in float64.

Every backend has the two functions of this module, ``forward`` and ``backward``, with the same arguments. The
backward is written out by hand, as the kernels compute it, so that each step has a twin to be checked
against; the tests check this module in turn against autograd through the naive definition of a MoE layer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .pools import ExpertPools, Gradients, Needs
from .routing import Routing


def swiglu(h_NG: Tensor) -> Tensor:
    """silu(gate) * up, rows [N, 2F] -> [N, F]."""
    gate, up = h_NG.chunk(2, dim=-1)
    return gate * torch.sigmoid(gate) * up


def swiglu_backward(grad_a_NF: Tensor, h_NG: Tensor) -> Tensor:
    """Gradient of ``swiglu`` with respect to its input, [N, 2F]."""
    gate, up = h_NG.chunk(2, dim=-1)
    sig = torch.sigmoid(gate)
    grad_gate = grad_a_NF * up * sig * (1 + gate * (1 - sig))
    return torch.cat([grad_gate, grad_a_NF * gate * sig], dim=-1)


def grouped_gemm(rows: Tensor, weight, offsets: list[int], out_features: int) -> Tensor:
    """rows[offsets[e]:offsets[e+1]] @ weight(e).T for every expert position e; ``weight`` gives [out, in]."""
    out = rows.new_empty(rows.shape[0], out_features)
    for e, (start, end) in enumerate(zip(offsets[:-1], offsets[1:], strict=True)):
        out[start:end] = rows[start:end] @ weight(e).T
    return out


def grouped_wgrad(grad_rows: Tensor, rows: Tensor, offsets: list[int], num_trained: int) -> Tensor:
    """grad_rows[e].T @ rows[e] for the trained positions, [S, out, in]; zeros for an expert without rows."""
    grad = rows.new_zeros(num_trained, grad_rows.shape[1], rows.shape[1])
    for e in range(num_trained):
        start, end = offsets[e], offsets[e + 1]
        grad[e] = grad_rows[start:end].T @ rows[start:end]
    return grad


def combine(y_ND: Tensor, weights_TK: Tensor, routing: Routing) -> Tensor:
    """Sum over the K slots of routing weight times expert output, [T, D]."""
    return (y_ND[routing.row_TK] * weights_TK[..., None]).sum(dim=1)


def forward(x_TD: Tensor, weights_TK: Tensor, pools: ExpertPools, routing: Routing) -> tuple[Tensor, Tensor]:
    """Output [T, D] and pre-activations H [N, 2F] of all routed experts."""
    offsets = routing.offsets_E1.tolist()
    h_NG = grouped_gemm(x_TD[routing.token_N], pools.gate_up, offsets, 2 * pools.intermediate_size)
    y_ND = grouped_gemm(swiglu(h_NG), pools.down, offsets, pools.hidden_size)
    return combine(y_ND, weights_TK.to(x_TD.dtype), routing), h_NG


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
    offsets = routing.offsets_E1.tolist()
    last = routing.num_experts if needs.all_rows else routing.num_trained
    rows = offsets[last]
    offsets = offsets[: last + 1]
    token, slot, h = routing.token_N[:rows], routing.slot_N[:rows], h_NG[:rows]
    weight_N1 = weights_TK.to(x_TD.dtype).reshape(-1)[slot, None]
    a_NF = swiglu(h)
    # Before the routing weight: its row-wise product with A is the routing weight's gradient, so the
    # down projection's output is never needed.
    grad_a_NF = grouped_gemm(grad_out_TD[token], lambda e: pools.down(e).T, offsets, pools.intermediate_size)
    grad_h_NG = swiglu_backward(grad_a_NF * weight_N1, h)

    grad_x = grad_weights = grad_gate_up = grad_down = None
    if needs.weights:
        grad_weights = torch.empty_like(weights_TK).reshape(-1)
        grad_weights[slot] = (grad_a_NF * a_NF).sum(dim=-1).to(weights_TK.dtype)
        grad_weights = grad_weights.view_as(weights_TK)
    if needs.x:
        grad_rows = grouped_gemm(grad_h_NG, lambda e: pools.gate_up(e).T, offsets, pools.hidden_size)
        grad_x = grad_rows[routing.row_TK].sum(dim=1)
    if needs.trained:
        s = routing.num_trained
        grad_gate_up = grouped_wgrad(grad_h_NG, x_TD[token], offsets, s)
        grad_down = grouped_wgrad(grad_out_TD[token], a_NF * weight_N1, offsets, s)
    return Gradients(grad_x, grad_weights, grad_gate_up, grad_down)

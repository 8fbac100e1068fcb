"""Plain PyTorch twin of every op: slow, obvious, and exact enough to run in float64.

The backward is written out by hand, as the kernels
compute it, so that each step has a twin to be checked against; the tests check this module in turn against autograd
through the naive definition of a MoE layer.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from esft_kernels.backend import Gradients, Needs
from esft_kernels.pools import ExpertPools, ExpertWeights
from esft_kernels.routing import Routing, route

__all__ = ["backward", "forward", "rebuild", "route"]


def grouped_gemm(rows: Tensor, weight, offsets: list[int], out_features: int, bias=None) -> Tensor:
    """rows[offsets[e]:offsets[e+1]] @ weight(e).T + bias(e) for every position e; ``weight`` gives [out, in].

    Rows past the last position's are zeros.
    """
    out = rows.new_zeros(rows.shape[0], out_features)
    for e, (start, end) in enumerate(zip(offsets[:-1], offsets[1:], strict=True)):
        out[start:end] = rows[start:end] @ weight(e).T
        if bias is not None and (b := bias(e)) is not None:
            out[start:end] += b
    return out


def grouped_wgrad(grad_rows: Tensor, rows: Tensor, offsets: list[int], num_trained: int) -> Tensor:
    """grad_rows[e].T @ rows[e] for the trained positions, [S, out, in]; zeros for an expert without rows."""
    grad = rows.new_zeros(num_trained, grad_rows.shape[1], rows.shape[1])
    for e in range(num_trained):
        start, end = offsets[e], offsets[e + 1]
        grad[e] = grad_rows[start:end].T @ rows[start:end]
    return grad


def bias_grad(grad_rows: Tensor, offsets: list[int], num_trained: int) -> Tensor:
    """Sums of the rows of the trained positions, [S, out]."""
    spans = zip(offsets[:num_trained], offsets[1 : num_trained + 1], strict=True)
    sums = [grad_rows[start:end].sum(dim=0) for start, end in spans]
    return torch.stack(sums) if sums else grad_rows.new_zeros(0, grad_rows.shape[1])


def combine(y_TKD: Tensor) -> Tensor:
    """Sum over the K slots, [T, D]."""
    return y_TKD.sum(dim=1)


def row_weights(weights_TK: Tensor, routing: Routing, dtype: torch.dtype) -> Tensor:
    """The routing weight of every row, [N, 1]."""
    return weights_TK.to(dtype).reshape(-1)[routing.slot_N, None]


def _pre_activations(x_TD: Tensor, pools: ExpertPools, routing: Routing) -> Tensor:
    offsets = routing.offsets_E1.tolist()
    return grouped_gemm(
        x_TD[routing.token_N], lambda e: pools.at(e).gate_up_EGD, offsets, pools.gate_up_size,
        lambda e: pools.at(e).gate_up_bias_EG,
    )  # fmt: skip


def forward(
    x_TD: Tensor, weights_TK: Tensor, pools: ExpertPools, routing: Routing, keep_rows: int
) -> tuple[Tensor, Tensor]:
    """Output [T, D] of all routed experts, and the pre-activations H [keep_rows, G] of the first rows."""
    offsets = routing.offsets_E1.tolist()
    h_NG = _pre_activations(x_TD, pools, routing)
    a_NF = pools.activation.forward(*pools.split(h_NG))
    y_ND = grouped_gemm(
        a_NF, lambda e: pools.at(e).down_EDF, offsets, pools.hidden_size, lambda e: pools.at(e).down_bias_ED
    )
    y_ND = y_ND * row_weights(weights_TK, routing, x_TD.dtype)
    return combine(y_ND[routing.row_TK]), h_NG[:keep_rows].clone()


def rebuild(x_TD: Tensor, h_prefix: Tensor, pools: ExpertPools, routing: Routing) -> Tensor:
    """H of all rows, [N, G], from that of the prefix."""
    h_NG = _pre_activations(x_TD, pools, routing)
    h_NG[: h_prefix.shape[0]] = h_prefix
    return h_NG


def grad_gemm(
    grad_out_TD: Tensor, h_NG: Tensor, weights_TK: Tensor, pools: ExpertPools, routing: Routing, needs: Needs
) -> tuple[Tensor, Tensor, Tensor]:
    """From the output's gradient to what the activation's backward yields, for the rows that ``needs`` asks for.

    Returns the gradient of H [rows, G], the activation times the routing weight [rows, F], and each row's sum of
    ``grad_a * a`` [rows]: before the routing weight, so that it is the routing weight's gradient, for which the down
    projection's output is never needed.
    """
    offsets = _offsets(routing, needs)
    rows = offsets[-1]
    gate, up = pools.split(h_NG[:rows])
    weight_N1 = row_weights(weights_TK, routing, grad_out_TD.dtype)[:rows]
    grad_y_ND = grad_out_TD[routing.token_N[:rows]]
    a_NF = pools.activation.forward(gate, up)
    grad_a_NF = grouped_gemm(grad_y_ND, lambda e: pools.at(e).down_EDF.T, offsets, pools.intermediate_size)
    grad_h_NG = torch.empty_like(h_NG[:rows])
    parts = pools.activation.backward(grad_a_NF * weight_N1, gate, up)
    for part, grad in zip(pools.split(grad_h_NG), parts, strict=True):
        if part is not None:
            part.copy_(grad)
    return grad_h_NG, a_NF * weight_N1, (grad_a_NF * a_NF).sum(dim=-1)


def bias_dot(grad_out_TD: Tensor, pools: ExpertPools, routing: Routing) -> Tensor:
    """``grad_out[token] @ down_bias`` of every row, [N]: the bias's part in the routing weights' gradient."""
    grad_y_ND, offsets = grad_out_TD[routing.token_N], routing.offsets_E1.tolist()
    out_N = grad_y_ND.new_zeros(routing.num_rows)
    for e, (start, end) in enumerate(zip(offsets[:-1], offsets[1:], strict=True)):
        if (bias_D := pools.at(e).down_bias_ED) is not None:
            out_N[start:end] = grad_y_ND[start:end] @ bias_D
    return out_N


def _offsets(routing: Routing, needs: Needs) -> list[int]:
    """Of the positions whose rows take part in a backward."""
    return routing.offsets_E1[: (routing.num_experts if needs.all_rows else routing.num_trained) + 1].tolist()


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
    grad_h_NG, weighted_a_NF, sums_N = grad_gemm(grad_out_TD, h_NG, weights_TK, pools, routing, needs)
    offsets, rows = _offsets(routing, needs), len(sums_N)
    token, slot = routing.token_N[:rows], routing.slot_N[:rows]
    grad_x = grad_weights = trained = None
    if needs.weights:
        grad_weights = torch.zeros_like(weights_TK).reshape(-1)
        grad_weights[slot] = (sums_N + bias_dot(grad_out_TD, pools, routing)[:rows]).to(weights_TK.dtype)
        grad_weights = grad_weights.view_as(weights_TK)
    if needs.x:
        grad_rows = grouped_gemm(grad_h_NG, lambda e: pools.at(e).gate_up_EGD.T, offsets, pools.hidden_size)
        grad_x = combine(F.pad(grad_rows, (0, 0, 0, routing.num_rows - rows))[routing.row_TK])
    if needs.trained:
        s, biased = routing.num_trained, pools.trained.down_bias_ED is not None
        grad_y_ND = grad_out_TD[token]
        weight_N1 = row_weights(weights_TK, routing, x_TD.dtype)[:rows]
        trained = ExpertWeights(
            grouped_wgrad(grad_h_NG, x_TD[token], offsets, s),
            grouped_wgrad(grad_y_ND, weighted_a_NF, offsets, s),
            bias_grad(grad_h_NG, offsets, s) if biased else None,
            bias_grad(grad_y_ND * weight_N1, offsets, s) if biased else None,
        )
    return Gradients(grad_x, grad_weights, trained)

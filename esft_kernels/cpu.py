"""The experts on a CPU, through oneDNN's matrix kernels.

One loop over the experts that have rows, so that an expert's rows stay in cache from the gather to the down
projection. Buffers are taken once per call and reused by every expert: a first touch of fresh memory can
cost more than the arithmetic done in it.

Row counts are rounded up for the matrix products. oneDNN generates code for every new shape and remembers a thousand;
routing makes thousands of row counts, which also drove the rest of a model's shapes out of that memory: pretraining
the example model ran 1.7 times as fast once all shapes were remembered. Functions and arguments are those of
``reference``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .pools import ExpertPools, Gradients, Needs
from .routing import Routing


def rounded(rows: int) -> int:
    """The row count that a product is computed with: eight sizes per power of two, at most an eighth too many."""
    step = 1 << max(0, rows.bit_length() - 4)
    return -(-rows // step) * step


def _spans(offsets: list[int], last: int) -> list[tuple[int, int, int]]:
    """(position, start, end) of every expert below ``last`` that has rows."""
    return [(e, offsets[e], offsets[e + 1]) for e in range(last) if offsets[e + 1] > offsets[e]]


def _rows_needed(spans: list[tuple[int, int, int]]) -> tuple[int, int]:
    """Rows of the per-expert buffers, and of an output into which every expert writes its rounded row count.

    An expert's surplus rows lie over the next one's, which are written after it.
    """
    sizes = [(rounded(end - start), start) for _, start, end in spans]
    return max((n for n, _ in sizes), default=0), max((start + n for n, start in sizes), default=0)


def _sum_slots(rows_ND: Tensor, routing: Routing) -> Tensor:
    """Sum of each token's K rows, [T, D]; one pass, accumulated in float32 for the 16-bit dtypes."""
    if routing.num_tokens == 0:
        return rows_ND.new_zeros(0, rows_ND.shape[1])
    return F.embedding_bag(routing.row_TK, rows_ND, mode="sum")


def forward(x_TD: Tensor, weights_TK: Tensor, pools: ExpertPools, routing: Routing) -> tuple[Tensor, Tensor]:
    """Output [T, D] and pre-activations H [N, 2F] of all routed experts."""
    offsets, f, d = routing.offsets_E1.tolist(), pools.intermediate_size, pools.hidden_size
    spans = _spans(offsets, routing.num_experts)
    longest, written = _rows_needed(spans)
    weight_N1 = weights_TK.reshape(-1)[routing.slot_N, None].to(x_TD.dtype)
    h_NG, y_ND = x_TD.new_empty(written, 2 * f), x_TD.new_empty(written, d)
    # Zeros, because the surplus rows are multiplied too, and what lies in fresh memory may be slow or not a number.
    x_buf, a_buf = x_TD.new_zeros(longest, d), x_TD.new_zeros(longest, f)
    for e, start, end in spans:
        n = end - start
        m, h = rounded(n), h_NG[start:end]
        torch.index_select(x_TD, 0, routing.token_N[start:end], out=x_buf[:n])
        torch.mm(x_buf[:m], pools.gate_up(e).T, out=h_NG[start : start + m])
        a = torch.mul(F.silu(h[:, :f]), h[:, f:], out=a_buf[:n])
        # The routing weight goes on A, which is narrower than the output row for every model with F < D.
        a.mul_(weight_N1[start:end])
        torch.mm(a_buf[:m], pools.down(e).T, out=y_ND[start : start + m])
    return _sum_slots(y_ND[: routing.num_rows], routing), h_NG[: routing.num_rows]


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
    offsets, f, d = routing.offsets_E1.tolist(), pools.intermediate_size, pools.hidden_size
    s = routing.num_trained
    spans = _spans(offsets, routing.num_experts if needs.all_rows else s)
    longest, written = _rows_needed(spans)
    weight_N1 = weights_TK.reshape(-1)[routing.slot_N, None].to(x_TD.dtype)

    grad_gate_up = torch.zeros_like(pools.trained_gate_up_SGD) if needs.trained else None
    grad_down = torch.zeros_like(pools.trained_down_SDF) if needs.trained else None
    grad_rows = x_TD.new_empty(written, d) if needs.x else None
    grad_weight_N = weights_TK.new_empty(routing.num_rows) if needs.weights else None
    do_buf, x_buf, dh_buf = x_TD.new_empty(longest, d), x_TD.new_empty(longest, d), x_TD.new_empty(longest, 2 * f)
    da_buf, a_buf = x_TD.new_empty(longest, f), x_TD.new_empty(longest, f)
    for e, start, end in spans:
        n, token, weight = end - start, routing.token_N[start:end], weight_N1[start:end]
        m, h = rounded(n), h_NG[start:end]
        for buffer in (do_buf, x_buf, a_buf, dh_buf):  # a weight gradient sums over the surplus rows
            buffer[n:m].zero_()
        da, a, dh = da_buf[:n], a_buf[:n], dh_buf[:n]
        gate, up = h[:, :f], h[:, f:]
        silu = F.silu(gate)
        torch.mul(silu, up, out=a)
        torch.index_select(grad_out_TD, 0, token, out=do_buf[:n])
        torch.mm(do_buf[:m], pools.down(e), out=da_buf[:m])
        if grad_weight_N is not None:
            # Row sums of a product, accumulated in the weights' own (float32) precision.
            grad_weight_N[routing.slot_N[start:end]] = (da * a).sum(dim=1, dtype=weights_TK.dtype)
        da.mul_(weight)
        torch.mul(da, silu, out=dh[:, f:])
        dh[:, :f] = torch.ops.aten.silu_backward(da.mul_(up), gate)
        if grad_rows is not None:
            torch.mm(dh_buf[:m], pools.gate_up(e), out=grad_rows[start : start + m])
        if grad_gate_up is not None and grad_down is not None and e < s:
            torch.index_select(x_TD, 0, token, out=x_buf[:n])
            torch.mm(dh_buf[:m].T, x_buf[:m], out=grad_gate_up[e])
            a.mul_(weight)
            torch.mm(do_buf[:m].T, a_buf[:m], out=grad_down[e])
    return Gradients(
        x_TD=_sum_slots(grad_rows[: routing.num_rows], routing) if grad_rows is not None else None,
        weights_TK=grad_weight_N.view_as(weights_TK) if grad_weight_N is not None else None,
        trained_gate_up_SGD=grad_gate_up,
        trained_down_SDF=grad_down,
    )

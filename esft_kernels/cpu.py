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

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .pools import ExpertPools, ExpertWeights, Gradients, Needs
from .routing import Routing


def rounded(rows: int) -> int:
    """The row count that a product is computed with: sixteen sizes per power of two, at most a sixteenth too many."""
    step = 1 << max(0, rows.bit_length() - 5)
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


# What an expert's rows are multiplied by: [in, out] views of its weights.
FACTORS: dict[str, Callable[[ExpertWeights], Tensor]] = {
    "up": lambda expert: expert.gate_up_EGD.T,
    "down": lambda expert: expert.down_EDF.T,
    "grad_a": lambda expert: expert.down_EDF,
    "grad_x": lambda expert: expert.gate_up_EGD,
}


class Products:
    """The products of rows with an expert's weights; ``cpu_packed`` has others of the same results."""

    def __init__(self, pools: ExpertPools):
        self.pools = pools

    def __call__(self, factor: str, position: int, rows: Tensor, out: Tensor) -> None:
        """``out = rows @ FACTORS[factor](weights at position)``."""
        torch.mm(rows, FACTORS[factor](self.pools.at(position)), out=out)


def _write_h(h_NG: Tensor, x_TD: Tensor, x_buf: Tensor, product: Products, routing: Routing, span) -> Tensor:
    """Write one expert's rows of H and return them. The surplus rows of the product go with them."""
    e, start, end = span
    m, bias = rounded(end - start), product.pools.at(e).gate_up_bias_EG
    torch.index_select(x_TD, 0, routing.token_N[start:end], out=x_buf[: end - start])
    product("up", e, x_buf[:m], h_NG[:m])
    h = h_NG[: end - start]
    return h if bias is None else h.add_(bias)


def forward(
    x_TD: Tensor, weights_TK: Tensor, pools: ExpertPools, routing: Routing, keep_rows: int,
    products: type[Products] = Products,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output [T, D] of all routed experts, and the pre-activations H [keep_rows, G] of the first rows.

    ``keep_rows`` is 0, the prefix, or all rows: an expert's rows are kept or not.
    """
    product = products(pools)
    offsets, f, d, g = routing.offsets_E1.tolist(), pools.intermediate_size, pools.hidden_size, pools.gate_up_size
    spans = _spans(offsets, routing.num_experts)
    longest, written = _rows_needed(spans)
    weight_N1 = weights_TK.reshape(-1)[routing.slot_N, None].to(x_TD.dtype)
    h_XG, y_ND = x_TD.new_empty(keep_rows, g), x_TD.new_empty(written, d)
    # Zeros, because the surplus rows are multiplied too, and what lies in fresh memory may be slow or not a number.
    x_buf, a_buf, h_buf = x_TD.new_zeros(longest, d), x_TD.new_zeros(longest, f), x_TD.new_empty(longest, g)
    for e, start, end in spans:
        n, weight = end - start, weight_N1[start:end]
        m, expert = rounded(n), pools.at(e)
        fits = start + m <= keep_rows  # with its surplus rows
        h = _write_h(h_XG[start:] if fits else h_buf, x_TD, x_buf, product, routing, (e, start, end))
        if end <= keep_rows and not fits:
            h_XG[start:end] = h
        # The routing weight goes on A, which is narrower than the output row for every model with F < D.
        pools.activation.forward_into(a_buf[:n], *pools.split(h))
        a_buf[:n].mul_(weight)
        product("down", e, a_buf[:m], y_ND[start : start + m])
        if expert.down_bias_ED is not None:
            y_ND[start:end].addcmul_(weight, expert.down_bias_ED)
    return _sum_slots(y_ND[: routing.num_rows], routing), h_XG


def rebuild(
    x_TD: Tensor, h_prefix: Tensor, pools: ExpertPools, routing: Routing, products: type[Products] = Products
) -> Tensor:
    """H of all rows, [N, G], from that of the prefix."""
    product = products(pools)
    spans = _spans(routing.offsets_E1.tolist(), routing.num_experts)
    longest, written = _rows_needed(spans)
    h_NG, x_buf = x_TD.new_empty(written, pools.gate_up_size), x_TD.new_zeros(longest, pools.hidden_size)
    for span in spans:
        if span[0] >= routing.num_trained:
            _write_h(h_NG[span[1] :], x_TD, x_buf, product, routing, span)
    h_NG[: h_prefix.shape[0]] = h_prefix
    return h_NG[: routing.num_rows]


def backward(
    grad_out_TD: Tensor,
    x_TD: Tensor,
    h_NG: Tensor,
    weights_TK: Tensor,
    pools: ExpertPools,
    routing: Routing,
    needs: Needs,
    products: type[Products] = Products,
) -> Gradients:
    """Gradients of ``forward``. Only the prefix of rows takes part when neither x nor weights need one."""
    product = products(pools)
    offsets, f, d, g = routing.offsets_E1.tolist(), pools.intermediate_size, pools.hidden_size, pools.gate_up_size
    s = routing.num_trained
    spans = _spans(offsets, routing.num_experts if needs.all_rows else s)
    longest, written = _rows_needed(spans)
    weight_N1 = weights_TK.reshape(-1)[routing.slot_N, None].to(x_TD.dtype)

    grads = ExpertWeights(*(None if t is None else torch.empty_like(t) for t in pools.trained.tensors()))
    for e in range(s if needs.trained else 0):
        if offsets[e] == offsets[e + 1]:  # no row, no gradient
            for grad in grads.tensors():
                if grad is not None:
                    grad[e].zero_()
    grad_rows = x_TD.new_empty(written, d) if needs.x else None
    grad_weight_N = weights_TK.new_empty(routing.num_rows) if needs.weights else None
    do_buf, x_buf, dh_buf = x_TD.new_empty(longest, d), x_TD.new_empty(longest, d), x_TD.new_empty(longest, g)
    da_buf, a_buf = x_TD.new_empty(longest, f), x_TD.new_empty(longest, f)
    for e, start, end in spans:
        n, token, weight = end - start, routing.token_N[start:end], weight_N1[start:end]
        m, expert = rounded(n), pools.at(e)
        gate, up = pools.split(h_NG[start:end])
        for buffer in (do_buf, x_buf, a_buf, dh_buf):  # a weight gradient sums over the surplus rows
            buffer[n:m].zero_()
        da, a, dh = da_buf[:n], a_buf[:n], dh_buf[:n]
        pools.activation.forward_into(a, gate, up)
        torch.index_select(grad_out_TD, 0, token, out=do_buf[:n])
        product("grad_a", e, do_buf[:m], da_buf[:m])
        if grad_weight_N is not None:
            # Row sums of a product, accumulated in the weights' own (float32) precision.
            sums = (da * a).sum(dim=1, dtype=weights_TK.dtype)
            if expert.down_bias_ED is not None:
                sums += torch.mv(do_buf[:n], expert.down_bias_ED)
            grad_weight_N[routing.slot_N[start:end]] = sums
        pools.activation.backward_into(*pools.split(dh), da.mul_(weight), gate, up)
        if grad_rows is not None:
            product("grad_x", e, dh_buf[:m], grad_rows[start : start + m])
        if needs.trained and e < s:
            torch.index_select(x_TD, 0, token, out=x_buf[:n])
            a.mul_(weight)
            torch.mm(dh_buf[:m].T, x_buf[:m], out=grads.gate_up_EGD[e])
            torch.mm(do_buf[:m].T, a_buf[:m], out=grads.down_EDF[e])
            if grads.gate_up_bias_EG is not None and grads.down_bias_ED is not None:
                grads.gate_up_bias_EG[e] = dh.sum(dim=0)
                grads.down_bias_ED[e] = torch.mv(do_buf[:n].T, weight[:, 0])
    return Gradients(
        x_TD=_sum_slots(grad_rows[: routing.num_rows], routing) if grad_rows is not None else None,
        weights_TK=grad_weight_N.view_as(weights_TK) if grad_weight_N is not None else None,
        trained=grads if needs.trained else None,
    )

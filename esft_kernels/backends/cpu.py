"""The experts on a CPU, through oneDNN's matrix kernels.

One loop over groups of experts whose rows stay in cache from the gather to the down projection: one large expert, or
many small ones, for which everything but the products is then a single call. Buffers are taken once per call and
reused by every group: a first touch of fresh memory can cost more than the arithmetic done in it.

Row counts are rounded up for the matrix products. oneDNN generates code for every new shape and remembers a thousand;
routing makes thousands of row counts, which also drove the rest of a model's shapes out of that memory: pretraining
the example model ran 1.7 times as fast once all shapes were remembered. Functions and arguments are those of
``reference``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from esft_kernels.backend import Gradients, Needs
from esft_kernels.backends.cpu_memory import take
from esft_kernels.pools import ExpertPools, ExpertWeights, Projection, QuantizedWeights
from esft_kernels.routing import Routing, route

__all__ = ["backward", "forward", "rebuild", "route"]

CACHE = 2 << 20  # bytes that one group's rows may take: what a core's second cache, or its share of the last, holds


def rounded(rows: int) -> int:
    """The row count that a product is computed with: sixteen sizes per power of two, at most a sixteenth too many."""
    step = 1 << max(0, rows.bit_length() - 5)
    return -(-rows // step) * step


# What an expert's rows are multiplied by: a matrix [out, in], and whether it is its transpose.
FACTORS: dict[str, tuple[Projection, bool]] = {
    "up": ("gate_up", True),
    "down": ("down", True),
    "grad_a": ("down", False),
    "grad_x": ("gate_up", False),
}


class Products:
    """The products of rows with an expert's weights; ``cpu_packed`` has others of the same results.

    Quantized weights are decoded right before a product, into one buffer that all products share.
    """

    def __init__(self, pools: ExpertPools):
        self.pools = pools
        frozen = pools.frozen
        self.buffer = frozen.buffer(pools.trained.down_EDF.dtype) if isinstance(frozen, QuantizedWeights) else None

    def __call__(self, factor: str, position: int, rows: Tensor, out: Tensor) -> None:
        """``out = rows @`` the factor of the expert at this position."""
        torch.mm(rows, self.factor(factor, position), out=out)

    def factor(self, factor: str, position: int) -> Tensor:
        """[in, out]; of a quantized pool it is good until the next one is asked for."""
        pool, index = self.pools.locate(position)
        projection, transposed = FACTORS[factor]
        matrix = pool.matrix(projection, index, self.buffer)  # pyright: ignore[reportArgumentType]
        return matrix.mT if transposed else matrix


@dataclass(frozen=True)
class Group:
    """Experts with rows, next to each other and on one side of the prefix, whose rows are worked on together."""

    spans: list[tuple[int, int, int]]  # (position, start, end) of every expert

    @property
    def rows(self) -> slice:
        return slice(self.spans[0][1], self.spans[-1][2])

    @property
    def size(self) -> int:
        return self.spans[-1][2] - self.spans[0][1]

    @property
    def rounded_size(self) -> int:
        """Rows of buffers that every expert's products may run over with their surplus rows.

        A surplus lies over the next expert's rows: as input it only has to be finite, as output it is written again.
        """
        return max(start - self.spans[0][1] + rounded(end - start) for _, start, end in self.spans)

    def products(self, product: Products, factor: str, rows: Tensor, out: Tensor) -> None:
        """``out = rows @ factor`` expert by expert; both begin at the group's first row."""
        for position, start, end in self.spans:
            place = start - self.spans[0][1]
            part = slice(place, place + rounded(end - start))
            product(factor, position, rows[part], out[part])

    def biases(self, pools: ExpertPools) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """The place of every expert's rows among the group's, and its biases [G] and [D]; nothing where it has none."""
        for position, start, end in self.spans if pools.trained.down_bias_ED is not None else ():
            pool, index = pools.locate(position)
            if pool.gate_up_bias_EG is not None and pool.down_bias_ED is not None:
                place = slice(start - self.spans[0][1], end - self.spans[0][1])
                yield place, pool.gate_up_bias_EG[index], pool.down_bias_ED[index]


def _groups(offsets: list[int], first: int, last: int, most_rows: int) -> list[Group]:
    """The experts at positions ``first`` to ``last`` that have rows; more than one together up to so many rows.

    What is done to all rows of a group at once is one call, which for small experts takes longer than the work in it.
    """
    groups: list[Group] = []
    for e in range(first, last):
        span = e, offsets[e], offsets[e + 1]
        if span[1] == span[2]:
            continue
        if groups and span[2] - groups[-1].rows.start <= most_rows:
            groups[-1].spans.append(span)
        else:
            groups.append(Group([span]))
    return groups


def _rows_needed(groups: list[Group], num_rows: int) -> tuple[int, int]:
    """Rows of the buffers that groups share, and of an output that has all rows and every expert's surplus ones."""
    sizes = [(group.rounded_size, group.rows.start) for group in groups]
    return max((n for n, _ in sizes), default=0), max([num_rows, *(start + n for n, start in sizes)])


def _most_rows(pools: ExpertPools, dtype: torch.dtype) -> int:
    """How many rows of X, H and A the cache holds."""
    return CACHE // ((pools.hidden_size + pools.gate_up_size + pools.intermediate_size) * dtype.itemsize)


def _sum_slots(rows_XD: Tensor, routing: Routing) -> Tensor:
    """Sum of each token's K rows, [T, D]; one pass, accumulated in float32 for the 16-bit dtypes."""
    rows_XD[int(routing.offsets_E1[-1]) : routing.num_rows] = 0  # the rows of no expert
    return F.embedding_bag(routing.row_TK, rows_XD[: routing.num_rows], mode="sum")


def _write_h(h_NG: Tensor, x_TD: Tensor, x_buf: Tensor, product: Products, routing: Routing, group: Group) -> None:
    """Write a group's rows of H, from the front of ``h_NG`` on. The surplus rows of the products go with them."""
    torch.index_select(x_TD, 0, routing.token_N[group.rows], out=x_buf[: group.size])
    group.products(product, "up", x_buf, h_NG)
    for place, gate_up_bias_G, _ in group.biases(product.pools):
        h_NG[place].add_(gate_up_bias_G)


def forward(
    x_TD: Tensor, weights_TK: Tensor, pools: ExpertPools, routing: Routing, keep_rows: int,
    products: type[Products] = Products,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output [T, D] of all routed experts, and the pre-activations H [keep_rows, G] of the first rows.

    ``keep_rows`` is 0, the prefix, or all rows: a group's rows are kept or not.
    """
    product = products(pools)
    offsets, f, d, g = routing.offsets_E1.tolist(), pools.intermediate_size, pools.hidden_size, pools.gate_up_size
    most, s = _most_rows(pools, x_TD.dtype), routing.num_trained
    groups = _groups(offsets, 0, s, most) + _groups(offsets, s, routing.num_experts, most)
    longest, written = _rows_needed(groups, routing.num_rows)
    weight_N1 = weights_TK.reshape(-1)[routing.slot_N, None].to(x_TD.dtype)
    h_XG, y_XD = take(x_TD, keep_rows, g), take(x_TD, written, d)
    # Zeros, because the surplus rows are multiplied too, and what lies in fresh memory may be slow or not a number.
    x_buf, a_buf, h_buf = take(x_TD, longest, d).zero_(), take(x_TD, longest, f).zero_(), take(x_TD, longest, g)
    for group in groups:
        rows, n = group.rows, group.size
        fits = rows.start + group.rounded_size <= keep_rows  # with its surplus rows
        h = h_XG[rows.start :] if fits else h_buf
        _write_h(h, x_TD, x_buf, product, routing, group)
        if rows.stop <= keep_rows and not fits:
            h_XG[rows] = h[:n]
        # The routing weight goes on A, which is narrower than the output row for every model with F < D.
        pools.activation.forward_into(a_buf[:n], *pools.split(h[:n]))
        a_buf[:n].mul_(weight_N1[rows])
        group.products(product, "down", a_buf, y_XD[rows.start :])
        for place, _, down_bias_D in group.biases(pools):
            y_XD[rows][place].addcmul_(weight_N1[rows][place], down_bias_D)
    return _sum_slots(y_XD, routing), h_XG


def rebuild(
    x_TD: Tensor, h_prefix: Tensor, pools: ExpertPools, routing: Routing, products: type[Products] = Products
) -> Tensor:
    """H of all rows, [N, G], from that of the prefix."""
    product = products(pools)
    most = _most_rows(pools, x_TD.dtype)
    groups = _groups(routing.offsets_E1.tolist(), routing.num_trained, routing.num_experts, most)
    longest, written = _rows_needed(groups, routing.num_rows)
    h_NG = take(x_TD, written, pools.gate_up_size)
    x_buf = take(x_TD, longest, pools.hidden_size).zero_()
    for group in groups:
        _write_h(h_NG[group.rows.start :], x_TD, x_buf, product, routing, group)
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
    s, most = routing.num_trained, _most_rows(pools, x_TD.dtype)
    # Trained experts one by one: their weight gradients sum over surplus rows, which must be zero then.
    groups = _groups(offsets, 0, s, 0)
    if needs.all_rows:
        groups += _groups(offsets, s, routing.num_experts, most)
    longest, written = _rows_needed(groups, routing.num_rows)
    weight_N1 = weights_TK.reshape(-1)[routing.slot_N, None].to(x_TD.dtype)

    grads = ExpertWeights(*(None if t is None else torch.empty_like(t) for t in pools.trained.tensors()))
    for e in range(s if needs.trained else 0):
        if offsets[e] == offsets[e + 1]:  # no row, no gradient
            for grad in grads.tensors():
                if grad is not None:
                    grad[e].zero_()
    grad_rows = take(x_TD, written, d) if needs.x else None
    grad_weight_N = weights_TK.new_zeros(routing.num_rows) if needs.weights else None
    do_buf, x_buf, dh_buf = take(x_TD, longest, d), take(x_TD, longest, d), take(x_TD, longest, g)
    da_buf, a_buf = take(x_TD, longest, f), take(x_TD, longest, f)
    for group in groups:
        rows, n, m = group.rows, group.size, group.rounded_size
        weight, (gate, up) = weight_N1[rows], pools.split(h_NG[rows])
        for buffer in (do_buf, x_buf, a_buf, dh_buf):
            buffer[n:m].zero_()
        da, a, dh = da_buf[:n], a_buf[:n], dh_buf[:n]
        pools.activation.forward_into(a, gate, up)
        torch.index_select(grad_out_TD, 0, routing.token_N[rows], out=do_buf[:n])
        group.products(product, "grad_a", do_buf, da_buf)
        if grad_weight_N is not None:
            # Row sums of a product, accumulated in the weights' own (float32) precision.
            sums = (da * a).sum(dim=1, dtype=weights_TK.dtype)
            for place, _, down_bias_D in group.biases(pools):
                sums[place] += torch.mv(do_buf[place], down_bias_D)
            grad_weight_N[routing.slot_N[rows]] = sums
        pools.activation.backward_into(*pools.split(dh), da.mul_(weight), gate, up)
        if grad_rows is not None:
            group.products(product, "grad_x", dh_buf, grad_rows[rows.start :])
        if needs.trained and rows.stop <= offsets[s]:
            e = group.spans[0][0]
            torch.index_select(x_TD, 0, routing.token_N[rows], out=x_buf[:n])
            a.mul_(weight)
            torch.mm(dh_buf[:m].T, x_buf[:m], out=grads.gate_up_EGD[e])
            torch.mm(do_buf[:m].T, a_buf[:m], out=grads.down_EDF[e])
            if grads.gate_up_bias_EG is not None and grads.down_bias_ED is not None:
                grads.gate_up_bias_EG[e] = dh.sum(dim=0)
                grads.down_bias_ED[e] = torch.mv(do_buf[:n].T, weight[:, 0])
    return Gradients(
        x_TD=_sum_slots(grad_rows, routing) if grad_rows is not None else None,
        weights_TK=grad_weight_N.view_as(weights_TK) if grad_weight_N is not None else None,
        trained=grads if needs.trained else None,
    )

"""Experts that compute nothing and take the memory of those that do, for a step on fake tensors.

Which expert gets which token would have to be known to compute. Here the trained ones have a given share of the rows,
and experts of one pool have equally many.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn

from esft_kernels.autograd_op import rows_to_keep
from esft_kernels.backend import Needs
from esft_kernels.backends.cpu import CACHE, rounded


@dataclass(frozen=True)
class Sizes:
    """What the memory of one layer's experts depends on.

    Attributes:
        experts, trained: E and S.
        shape: (G, D, F) of one expert.
        share: of the rows that are on trained experts.
        recompute: one of ``esft_kernels.RECOMPUTE``.
        scratch: bytes in which frozen weights are made from few bits.
        biased: whether they have biases.
        adapted: whether PEFT adds low-rank matrices to the stock experts' weights, out of place.
    """

    experts: int
    trained: int
    shape: tuple[int, int, int]
    share: float
    recompute: str = "none"
    scratch: int = 0
    biased: bool = False
    adapted: bool = False

    def prefix(self, rows: int) -> int:
        return 0 if not self.trained else rows if self.trained == self.experts else round(self.share * rows)

    def longest(self, rows: int, itemsize: int, backward: bool, all_rows: bool = True) -> int:
        """Rows of the buffers that groups of experts share: those of the largest expert, or of as many together as the
        cache holds. In the backward trained experts are alone, and frozen ones take no part without ``all_rows``."""
        cache = CACHE // (sum(self.shape) * itemsize)
        trained, frozen = self.prefix(rows), rows - self.prefix(rows)
        sizes = [ceil(trained / max(self.trained, 1)), 0 if backward else min(trained, cache)]
        if all_rows:
            sizes += [ceil(frozen / max(self.experts - self.trained, 1)), min(frozen, cache)]
        return rounded(max(sizes))


class StandIn(nn.Module):
    """In the place of ``Experts``: the same trained pool, and no frozen one.

    With ``adapted`` it is in the place of stock experts through ``grouped_mm`` instead: every row is kept before and
    after each of its steps, and so are the sums of weights and additions, of which all get a gradient.

    Args:
        sizes: of the layer.
        dtype: that is computed in.
    """

    def __init__(self, sizes: Sizes, dtype: torch.dtype):
        super().__init__()
        self.sizes, self.num_experts = sizes, sizes.experts
        (g, d, f), s = sizes.shape, sizes.trained
        shapes = [(s, g, d), (s, d, f), *([(s, g), (s, d)] if sizes.biased else [])]
        self.trained = nn.ParameterList(
            nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=s > 0) for shape in shapes
        )

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        x_TD = hidden_states.to(self.trained[0].dtype)
        out: Any = _Memory.apply(x_TD, top_k_index, top_k_weights, self.sizes, *self.trained)
        return out.to(hidden_states.dtype)


class _Memory(torch.autograd.Function):
    """Tensors that are kept, made and let go like those of the CPU's backend, with nothing written."""

    @staticmethod
    def forward(ctx, x, index, weights, sizes, *trained):  # pyright: ignore[reportIncompatibleMethodOverride]
        (g, d, f), rows = sizes.shape, index.numel()
        ctx.needs = Needs(ctx.needs_input_grad[0], ctx.needs_input_grad[2], any(ctx.needs_input_grad[4:]))
        keep = rows_to_keep(ctx.needs, sizes.recompute)
        h = x.new_empty({"all": rows, "prefix": sizes.prefix(rows), "none": 0}[keep], g)
        merged = None
        if sizes.adapted:
            h, merged = x.new_empty(rows, 2 * d + g + 2 * f), x.new_empty(sizes.experts, g * d + d * f)
        routing = [index.new_empty(rows, dtype=torch.int64) for _ in range(3)]
        scratch = _scratch(x, sizes, sizes.longest(rows, x.dtype.itemsize, backward=False), d + f + g, rows)
        out_rows = x.new_empty(rows, d)
        out = torch.empty_like(x)
        del scratch, out_rows  # alive until here, as in a function that ends
        ctx.save_for_backward(x, weights, h, *routing, *trained)
        ctx.sizes, ctx.merged = sizes, merged
        return out

    @staticmethod
    def backward(ctx, grad_out):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weights, h, *rest = ctx.saved_tensors
        sizes, needs, rows, trained = ctx.sizes, ctx.needs, rest[0].numel(), rest[3:]
        g, d, f = sizes.shape
        if needs.all_rows and h.shape[0] < rows:
            h = x.new_empty(rows, g)
        grad_merged = None if ctx.merged is None else torch.empty_like(ctx.merged)
        grads = [torch.empty_like(p) if needs.trained else None for p in trained]
        grad_rows = x.new_empty(rows, d) if needs.x else None
        longest = sizes.longest(rows, x.dtype.itemsize, backward=True, all_rows=needs.all_rows)
        scratch = _scratch(x, sizes, longest, 2 * d + g + 3 * f, rows)
        grad_x = torch.empty_like(x) if grad_rows is not None else None
        grad_weights = torch.empty_like(weights) if needs.weights else None
        del scratch, grad_merged, grad_rows
        return grad_x, None, grad_weights, None, *grads


def _scratch(x: Tensor, sizes: Sizes, longest: int, columns: int, rows: int) -> list[Tensor]:
    """The buffers of a pass, the rows' routing weights, and room to unpack in."""
    return [x.new_empty(longest, columns), x.new_empty(rows, 1), x.new_empty(sizes.scratch, dtype=torch.uint8)]

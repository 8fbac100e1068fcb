"""Codes to values and back in plain PyTorch, by tables.

To values, two codes are one index into a table of pairs: half as many lookups as codes. A pair of float32 is moved as
one int64, which is copied bit by bit. Back, ``torch.bucketize`` would search for each value; a table of narrow bins
knows the answer but for one comparison, which is several times as fast on a CPU.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor


@cache
def pairs(values: tuple[float, ...], high_first: bool, device: torch.device) -> Tensor:
    """int64 [C * C]: for every two codes of C, as bits next to each other, their two float32 values.

    Args:
        values: of the C codes, a power of two.
        high_first: whether the code in the high bits is the first one.
    """
    column = torch.tensor(values, dtype=torch.float32, device=device)
    high, low = column.repeat_interleave(len(values)), column.repeat(len(values))
    both = (high, low) if high_first else (low, high)
    return torch.stack(both, dim=-1).view(torch.int64).view(-1)


def look_up(index_N: Tensor, pairs_X: Tensor) -> Tensor:
    """float32 [2 * N]: the pairs that ``index`` (unsigned integers) names, one after the other."""
    return pairs_X.index_select(0, index_N.int()).view(torch.float32)


_BINS = 1024


class Bins(NamedTuple):
    """A line cut into bins, none with more than one edge.

    Attributes:
        low, per_unit: the bin of x is ``(x - low) * per_unit``, cut off at both ends.
        below: uint8, the number of edges below each bin.
        edge: float32, the edge in each bin; infinity where it has none.
    """

    low: float
    per_unit: float
    below: Tensor
    edge: Tensor

    def of(self, x_N: Tensor) -> Tensor:
        return ((x_N - self.low) * self.per_unit).int().clamp_(0, _BINS - 1)


@cache
def bins_of(edges: tuple[float, ...], device: torch.device) -> Bins:
    """Bins for ``count_below``. Raises ValueError for edges too close to each other."""
    margin = (edges[-1] - edges[0]) / len(edges)
    low, high = edges[0] - margin, edges[-1] + margin
    edge = torch.full((_BINS,), torch.inf)
    bins = Bins(low, _BINS / (high - low), torch.zeros(_BINS), edge)
    numbers = torch.tensor(edges, dtype=torch.float32)
    held = bins.of(numbers).long()  # by the same arithmetic as every value's, so that no rounding tells them apart
    if len(held.unique()) < len(edges):
        raise ValueError(f"edges {edges} are too close to each other")
    edge[held] = numbers
    below = torch.zeros(_BINS, dtype=torch.uint8)
    below[1:] = edge.isfinite().cumsum(0)[:-1]
    return Bins(bins.low, bins.per_unit, below.to(device), edge.to(device))


def count_below(x_N: Tensor, bins: Bins) -> Tensor:
    """uint8: how many edges are smaller than each finite value, as ``torch.bucketize`` counts them."""
    held = bins.of(x_N)
    return bins.below.index_select(0, held).add_((x_N > bins.edge.index_select(0, held)).view(torch.uint8))

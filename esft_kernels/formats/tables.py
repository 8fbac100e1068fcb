"""Codes to values in plain PyTorch: two codes are one index into a table of pairs of values.

Half as many lookups as codes. A pair of float32 is moved as one int64, which is copied bit by bit.
"""

from __future__ import annotations

from functools import cache

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

"""Routing of tokens to experts, sorted so that the trained experts' rows come first.

Legend (used in names everywhere): T tokens, K experts per token, N = T*K rows, E experts, S trained
experts, D hidden size, F expert intermediate size, G = 2F.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def expert_order(trained: Sequence[int], num_experts: int) -> list[int]:
    """Expert ids in row order: the trained ones first, in the given order, then the frozen ones ascending.

    Raises ValueError when an id is repeated or outside ``range(num_experts)``.
    """
    bad = [e for e in trained if not 0 <= e < num_experts]
    if bad:
        raise ValueError(f"trained experts {bad} are not in a layer of {num_experts} experts")
    if len(set(trained)) != len(trained):
        raise ValueError(f"trained experts {list(trained)} hold a duplicate")
    chosen = set(trained)
    return [*trained, *(e for e in range(num_experts) if e not in chosen)]


@dataclass(frozen=True)
class Routing:
    """The T*K (token, slot) rows of one layer, grouped by expert, trained experts first.

    Experts are numbered by *position*: positions 0..S-1 are the trained pool, S..E-1 the frozen pool. The rows
    of the trained experts are therefore the prefix ``[:offsets_E1[S]]`` of every row-indexed tensor. Rows from
    ``offsets_E1[E]`` on are of no expert here: they add nothing and get no gradient.
    """

    token_N: Tensor  # int64 [N], row -> token
    slot_N: Tensor  # int64 [N], row -> flat (token, slot) index t*K + k
    row_TK: Tensor  # int64 [T, K], (token, slot) -> row; the inverse of slot_N
    offsets_E1: Tensor  # int64 [E+1], rows of the expert at position e are offsets[e]:offsets[e+1]
    num_trained: int  # S
    elsewhere: bool = False  # whether there may be rows of no expert here

    @property
    def num_tokens(self) -> int:
        return self.row_TK.shape[0]

    @property
    def top_k(self) -> int:
        return self.row_TK.shape[1]

    @property
    def num_rows(self) -> int:
        return self.token_N.shape[0]

    @property
    def num_experts(self) -> int:
        return self.offsets_E1.shape[0] - 1

    def prefix_rows(self) -> int:
        """N_s, the number of rows on trained experts. Waits for the device when the routing lives on one."""
        return int(self.offsets_E1[self.num_trained])

    def rows_here(self) -> int:
        """The number of rows on experts here. Waits for the device only where there may be others."""
        return int(self.offsets_E1[-1]) if self.elsewhere else self.num_rows


def route(
    top_k_index_TK: Tensor,
    position: Tensor,
    num_trained: int,
    elsewhere: bool = False,
    num_positions: int | None = None,
    adapter_T: Tensor | None = None,
) -> Routing:
    """Sort the rows of a top-k choice by expert position.

    Args:
        top_k_index_TK: integer [T, K], expert ids in ``range(E)``; a token never names an expert twice.
        position: int64 [E], expert id -> position (the inverse of ``expert_order``); or such a row for each of several
            adapters, [A, E]. Of an expert that is not here, ``num_positions``.
        num_trained: S.
        elsewhere: some experts are not here (of another rank); ids of E and above are allowed, and are none here.
        num_positions: how many there are; E where it is not given. With adapters it is more, as each has its own copies
            of the experts that it has trained, and where experts are elsewhere less.
        adapter_T: integer [T], which row of ``position`` holds for a token; where there are several, and only there.

    The sort is stable, so equal inputs give equal routings and the rows of an expert keep token order. Ids out of range
    raise ValueError on a CPU; on a GPU, where looking would wait for the device, only with ESFT_DEBUG=1.
    """
    check_choice(top_k_index_TK, position, elsewhere, adapter_T)
    num_tokens, top_k = top_k_index_TK.shape
    positions = position.shape[-1] if num_positions is None else num_positions
    position_N = positions_of(top_k_index_TK, position, adapter_T, positions if elsewhere else None).reshape(-1)
    sorted_N, slot_N = torch.sort(position_N, stable=True)
    row_N = torch.empty_like(slot_N)
    row_N[slot_N] = torch.arange(slot_N.numel(), device=slot_N.device)
    edges_E1 = torch.arange(positions + 1, device=slot_N.device)
    return Routing(
        token_N=torch.div(slot_N, max(top_k, 1), rounding_mode="floor"),
        slot_N=slot_N,
        row_TK=row_N.view(num_tokens, top_k),
        offsets_E1=torch.searchsorted(sorted_N, edges_E1),
        num_trained=num_trained,
        elsewhere=elsewhere,
    )


def positions_of(
    top_k_index_TK: Tensor, position: Tensor, adapter_T: Tensor | None = None, elsewhere: int | None = None
) -> Tensor:
    """The position of every chosen expert, int64 [T, K]: one lookup, however many adapters there are.

    Args:
        elsewhere: the position of ids of E and above, where there may be such; the others are those of ``route``.
    """
    if elsewhere is not None:
        top_k_index_TK = top_k_index_TK.clamp(max=position.shape[-1])
        position = F.pad(position, (0, 1), value=elsewhere)
    if adapter_T is not None:
        top_k_index_TK = torch.add(top_k_index_TK, adapter_T[:, None], alpha=position.shape[-1])
        position = position.reshape(-1)
    return position[top_k_index_TK]


def check_choice(top_k_index_TK: Tensor, position: Tensor, elsewhere: bool, adapter_T: Tensor | None) -> None:
    """Raise ValueError for arguments of ``route`` that do not fit; at values it looks where that does not wait."""
    if top_k_index_TK.dim() != 2 or top_k_index_TK.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"top_k_index must be an integer [T, K] tensor, got {top_k_index_TK.dtype} {tuple(top_k_index_TK.shape)}"
        )
    look = top_k_index_TK.device.type == "cpu" or os.environ.get("ESFT_DEBUG") == "1"
    if look:
        _check_ids(top_k_index_TK, None if elsewhere else position.shape[-1])
    _check_adapters(adapter_T, position, len(top_k_index_TK), look)


def _check_ids(top_k_index_TK: Tensor, num_experts: int | None) -> None:
    outside = top_k_index_TK < 0
    if num_experts is not None:
        outside |= top_k_index_TK >= num_experts
    if outside.any():
        token, slot = outside.nonzero()[0].tolist()
        found = f"top_k_index[{token}, {slot}] is {int(top_k_index_TK[token, slot])}"
        raise ValueError(f"{found}, not an expert" + (f" in 0..{num_experts - 1}" if num_experts is not None else ""))


def _check_adapters(adapter_T: Tensor | None, position: Tensor, num_tokens: int, look: bool) -> None:
    if (adapter_T is None) != (position.dim() == 1):
        raise ValueError(f"positions {tuple(position.shape)} {'need' if adapter_T is None else 'have no'} adapters")
    if adapter_T is None:
        return
    if adapter_T.shape != (num_tokens,) or adapter_T.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"adapters must be an integer [T] tensor for {num_tokens} tokens, "
            f"got {adapter_T.dtype} {tuple(adapter_T.shape)}"
        )
    if look and ((adapter_T < 0) | (adapter_T >= len(position))).any():
        raise ValueError(f"adapters must be in 0..{len(position) - 1}, got {adapter_T.unique().tolist()}")

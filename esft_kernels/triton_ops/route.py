"""Triton: the rows of a top-k choice, sorted by expert position.

A counting sort in two launches. Each program has a share of the slots: it counts them by position, and, when all counts
are there, knows where the first of its own goes, and puts them one after the other. Equal positions keep their order,
and no two programs write to one place: the same rows every time, without atomics.
"""

# Launches take more than the kernel signature that triton.jit passes on to the type checker.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from esft_kernels.routing import Routing
from esft_kernels.triton_ops.tiles import cdiv, next_power_of_2

_SHARES = 128  # programs at most: each reads all counts
_WORK = 4096  # elements of a block of slots by positions


@triton.jit
def _positions(
    index_ptr, table_ptr, adapter_ptr, slot_N, end, num_experts, num_positions, TOP_K: tl.constexpr
):  # fmt: skip
    """The position of every slot's expert, ``num_positions`` where it is not here, and -1 from ``end`` on."""
    inside_N = slot_N < end
    expert_N = tl.load(index_ptr + slot_N, mask=inside_N, other=0).to(tl.int64)
    here_N = inside_N & (expert_N >= 0) & (expert_N < num_experts)
    if adapter_ptr is not None:
        expert_N += tl.load(adapter_ptr + slot_N // TOP_K, mask=inside_N, other=0).to(tl.int64) * num_experts
    position_N = tl.load(table_ptr + expert_N, mask=here_N, other=num_positions)
    return tl.where(inside_N, position_N, -1).to(tl.int32)


@triton.jit(do_not_specialize=["num_slots", "share"])
def _count_kernel(
    index_ptr,  # int32 or int64 [N]
    table_ptr,  # int64 [E] or [A, E]
    adapter_ptr,  # int32 or int64 [T], or None
    counts_ptr,  # int32 [shares, BLOCK_P]
    num_slots, share, num_experts, num_positions,
    TOP_K: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    p_P = tl.arange(0, BLOCK_P)
    count_P = tl.zeros((BLOCK_P,), dtype=tl.int32)
    first = tl.program_id(0) * share
    end = tl.minimum(first + share, num_slots)
    for start in range(first, end, BLOCK_N):
        slot_N = start + tl.arange(0, BLOCK_N)
        position_N = _positions(
            index_ptr, table_ptr, adapter_ptr, slot_N, end, num_experts, num_positions, TOP_K
        )  # fmt: skip
        count_P += tl.sum((position_N[:, None] == p_P[None, :]).to(tl.int32), axis=0)
    tl.store(counts_ptr + tl.program_id(0) * BLOCK_P + p_P, count_P)


@triton.jit(do_not_specialize=["num_slots", "share", "num_shares"])
def _place_kernel(
    index_ptr, table_ptr, adapter_ptr,  # as above
    counts_ptr,  # int32 [shares, BLOCK_P]
    token_ptr, slot_ptr,  # int64 [N] by row
    row_ptr,  # int64 [N] by slot
    offsets_ptr,  # int64 [P + 1]
    num_slots, share, num_shares, num_experts, num_positions,
    TOP_K: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    p_P = tl.arange(0, BLOCK_P)
    total_P = tl.zeros((BLOCK_P,), dtype=tl.int32)
    before_P = tl.zeros((BLOCK_P,), dtype=tl.int32)
    for b in range(0, num_shares, BLOCK_B):
        b_B = b + tl.arange(0, BLOCK_B)
        count_BP = tl.load(
            counts_ptr + b_B[:, None] * BLOCK_P + p_P[None, :], mask=(b_B < num_shares)[:, None], other=0
        )
        total_P += tl.sum(count_BP, axis=0)
        before_P += tl.sum(tl.where((b_B < tl.program_id(0))[:, None], count_BP, 0), axis=0)
    offset_P = tl.cumsum(total_P, axis=0) - total_P
    if tl.program_id(0) == 0:
        tl.store(offsets_ptr + p_P, offset_P.to(tl.int64), mask=p_P <= num_positions)

    next_P = offset_P + before_P  # the row of this share's next slot of each position
    first = tl.program_id(0) * share
    end = tl.minimum(first + share, num_slots)
    for start in range(first, end, BLOCK_N):
        slot_N = start + tl.arange(0, BLOCK_N)
        position_N = _positions(
            index_ptr, table_ptr, adapter_ptr, slot_N, end, num_experts, num_positions, TOP_K
        )  # fmt: skip
        same_NP = (position_N[:, None] == p_P[None, :]).to(tl.int32)
        earlier_NP = tl.cumsum(same_NP, axis=0) - same_NP
        row_N = tl.sum((earlier_NP + next_P[None, :]) * same_NP, axis=1)
        tl.store(row_ptr + slot_N, row_N.to(tl.int64), mask=slot_N < end)
        tl.store(slot_ptr + row_N, slot_N.to(tl.int64), mask=slot_N < end)
        tl.store(token_ptr + row_N, (slot_N // TOP_K).to(tl.int64), mask=slot_N < end)
        next_P += tl.sum(same_NP, axis=0)


def route(
    top_k_index_TK: Tensor,
    position: Tensor,
    num_trained: int,
    num_positions: int,
    adapter_T: Tensor | None = None,
    elsewhere: bool = False,
) -> Routing:
    """``esft_kernels.routing.route`` of arguments that have been checked; any other id is of an expert elsewhere.

    Args:
        top_k_index_TK: integer [T, K].
        position: int64 [E], or [A, E] with adapters.
        adapter_T: integer [T].
        elsewhere: what the routing says of itself.

    Raises ValueError for 2**31 rows and more.
    """
    num_tokens, top_k = top_k_index_TK.shape
    num_slots = num_tokens * top_k
    if num_slots >= 2**31:
        raise ValueError(f"a batch must have fewer than 2**31 rows, got {num_slots:,}")
    block_p = next_power_of_2(num_positions + 1)
    block_n = max(16, min(_WORK // block_p, 256))
    share = cdiv(cdiv(num_slots, block_n), _SHARES) * block_n
    shares = cdiv(num_slots, share) if num_slots else 1
    index_N, position = top_k_index_TK.contiguous(), position.contiguous()
    counts = index_N.new_empty(shares, block_p, dtype=torch.int32)
    token_N, slot_N, row_TK = (
        index_N.new_empty(size, dtype=torch.int64) for size in (num_slots, num_slots, (num_tokens, top_k))
    )
    offsets_P1 = index_N.new_empty(num_positions + 1, dtype=torch.int64)
    where = (index_N, position, None if adapter_T is None else adapter_T.contiguous(), counts)
    sizes = {"TOP_K": max(top_k, 1), "BLOCK_P": block_p, "BLOCK_N": block_n, "num_warps": 8, "num_stages": 1}
    _count_kernel[(shares,)](*where, num_slots, share, position.shape[-1], num_positions, **sizes)
    _place_kernel[(shares,)](
        *where, token_N, slot_N, row_TK, offsets_P1, num_slots, share, shares, position.shape[-1], num_positions,
        **sizes, BLOCK_B=max(1, min(_WORK // block_p, next_power_of_2(shares))),
    )  # fmt: skip
    return Routing(token_N, slot_N, row_TK, offsets_P1, num_trained, elsewhere)

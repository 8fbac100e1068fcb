"""Triton: tiles that the tensor memory accelerator (TMA) of NVIDIA's GPUs, from sm_90 on, loads by a descriptor.

One thread asks for a whole tile, where pointers take an address and an instruction for every 16 bytes. A program makes
the descriptors of its expert itself, in a scratch of 128 bytes each, so that a launch has the operands that it has by
pointers; the scratch comes from PyTorch's allocator.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportReturnType=false

from __future__ import annotations

from collections.abc import Callable
from contextvars import copy_context
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

ALIGNMENT = 16  # bytes, of every address and stride but the last one, which is one element


@triton.jit
def weight_descriptor(
    weight_ptr, out_features, in_features, stride_out, stride_in,
    LAYOUT: tl.constexpr, PAIRED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Of one expert's matrix, whose rows in memory LAYOUT names.

    PAIRED where its rows are all gates before all ups and (gate, up) in turn are asked for: a view of three dimensions
    has each gate's row beside its up's, so a tile is one piece whatever the order in memory.
    """
    if LAYOUT == "out_in":
        rows = out_features
        columns = in_features
        stride = stride_out
        ROWS: tl.constexpr = BLOCK_N
        COLUMNS: tl.constexpr = BLOCK_K
    else:
        rows = in_features
        columns = out_features
        stride = stride_in
        ROWS: tl.constexpr = BLOCK_K
        COLUMNS: tl.constexpr = BLOCK_N
    if PAIRED:
        pairs = rows // 2
        tiles = tl.make_tensor_descriptor(
            weight_ptr, [pairs, 2, columns], [stride, pairs * stride, 1], [ROWS // 2, 2, COLUMNS]
        )
    else:
        tiles = tl.make_tensor_descriptor(weight_ptr, [rows, columns], [stride, 1], [ROWS, COLUMNS])
    return tiles


@triton.jit
def load_weight_tile(
    descriptor, column, k,
    LAYOUT: tl.constexpr, PAIRED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """[K, N] from an output and an input feature on; zeros past the last of either."""
    if LAYOUT == "out_in":
        if PAIRED:
            tile_NK = tl.reshape(descriptor.load([column // 2, 0, k]), (BLOCK_N, BLOCK_K))
        else:
            tile_NK = descriptor.load([column, k])
        tile_KN = tl.trans(tile_NK)
    elif PAIRED:
        tile_KN = tl.reshape(descriptor.load([k // 2, 0, column]), (BLOCK_K, BLOCK_N))
    else:
        tile_KN = descriptor.load([k, column])
    return tile_KN


@triton.jit
def rows_descriptor(rows_ptr, end, features, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Of contiguous [end, features]; loads are zero from ``end`` on."""
    return tl.make_tensor_descriptor(rows_ptr, [end.to(tl.int32), features], [features, 1], [ROWS, COLUMNS])


Layout = Literal["out_in", "in_out"]


def weight_layout(trained_SOI: Tensor, frozen_ROI: Tensor, paired: Literal["out", "in"] | None) -> Layout | None:
    """Which features are the rows of the weights' matrices in memory; None where descriptors cannot load them.

    Args:
        trained_SOI, frozen_ROI: with the same strides; one may hold no expert.
        paired: whether output or input features are (gate, up) in turn and the weights have all gates first; they
            have to be the rows then.
    """
    pools = [pool for pool in (trained_SOI, frozen_ROI) if pool.numel()]
    if not pools:
        return None
    _, out_features, in_features = pools[0].stride()
    layout: Layout = "out_in" if in_features == 1 else "in_out"
    if paired is not None and not layout.startswith(paired):
        return None
    return layout if all(aligned(pool if layout == "out_in" else pool.mT) for pool in pools) else None


def aligned(tensor: Tensor) -> bool:
    """Whether a descriptor can be made of the last two dimensions, at every index of those before."""
    *strides, last = tensor.stride()
    places = [tensor.data_ptr(), *(stride * tensor.element_size() for stride in strides)]
    return last == 1 and all(place % ALIGNMENT == 0 for place in places)


def launch(kernel: Callable[..., object], descriptors: bool, *args: object, **options: object) -> None:
    """Launch a kernel, with memory at hand for its descriptors; the allocator of the caller's own kernels stays."""
    if descriptors:
        copy_context().run(_launch, kernel, args, options)
    else:
        kernel(*args, **options)


def _launch(kernel: Callable[..., object], args: tuple, options: dict) -> None:
    triton.set_allocator(_allocate)  # of this context alone, and an autograd thread has a fresh one
    kernel(*args, **options)


def _allocate(size: int, alignment: int, stream: int | None) -> Tensor:
    """On the current device and stream, on which the kernel runs: freed memory is taken again after it."""
    return torch.empty(size, dtype=torch.int8, device="cuda")

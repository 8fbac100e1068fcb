"""Memory for the CPU backend's large buffers, which comes back when nothing holds it any more and is given out again.

Taken from the allocator in every call, the rows of a layer would be fresh pages each time, whose first touch can cost
more than the arithmetic done in them. And an allocator that keeps freed memory cannot always use it again: glibc aligns
a block by asking for a larger one, so a hole of just its size does not do (docs/log.md).
"""

from __future__ import annotations

import mmap
import threading
import weakref
from math import prod

import torch
from torch import Tensor

SMALLEST = 1 << 20  # bytes; what is smaller is the allocator's own business
_free: list[mmap.mmap] = []  # blocks that nothing uses now; they come back at any time, from any thread
_choosing = threading.Lock()  # one thread at a time takes from them


def take(like: Tensor, *shape: int) -> Tensor:
    """A tensor like ``like.new_empty(shape)``: its values are anything."""
    size = prod(shape) * like.dtype.itemsize
    if size < SMALLEST or not hasattr(mmap, "MAP_ANONYMOUS"):  # Windows has no such blocks
        return like.new_empty(shape)
    with _choosing:
        block = _fitting(size)
    # Tensor -> view -> block: when the last tensor over it is gone, so is the view, and only the block is left.
    view = memoryview(block)
    weakref.finalize(view, _free.append, block).atexit = False
    return torch.frombuffer(view, dtype=like.dtype, count=prod(shape)).view(shape)


def _fitting(size: int) -> mmap.mmap:
    """A block of at least so many bytes: a free one that is at most twice as large, or a new one.

    A new one takes the place of a free one that is too small, so that blocks of growing sizes do not pile up.
    """
    fitting = [block for block in _free if size <= len(block) <= 2 * size]
    if fitting:
        block = min(fitting, key=len)
        _free.remove(block)
        return block
    if smaller := [block for block in _free if len(block) < size]:
        _free.remove(max(smaller, key=len))
    block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        block.madvise(mmap.MADV_HUGEPAGE)
    return block

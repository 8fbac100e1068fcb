"""What this process does with memory that it has freed: keep it, or give it back to the system.

Kept memory saves the page faults of taking it anew at every step, which on a virtual machine can cost more than the
arithmetic. But what is kept lies in pieces that not everything fits into: OLMoE-1B-7B with nf4 trains in 13.1 GB where
freed memory is kept, and in 8.4 GB at 0.6 of the tokens a second where it is given back (docs/few_bits.md). So memory
is kept where there is plenty.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import sys
from contextlib import suppress
from pathlib import Path

PLENTY = 3  # times what the weights take
LARGE = 4 << 20  # bytes: blocks from here on are given back
TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4  # of malloc.h


def settle_memory(args: argparse.Namespace) -> None:
    """Choose for the stage that is about to run, before PyTorch takes any memory. Changes nothing but on Linux."""
    if sys.platform != "linux" or not hasattr(libc := ctypes.CDLL(None), "mallopt"):
        return
    if _is_tight(args):
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # of PyTorch: large blocks in pages of 2 MB, so fewer faults
        libc.mallopt(MMAP_THRESHOLD, LARGE)
    else:
        libc.mallopt(TRIM_THRESHOLD, -1)
        libc.mallopt(MMAP_MAX, 0)


def _is_tight(args: argparse.Namespace) -> bool:
    """Whether the memory that is free is not many times what the weights of the stage's model take."""
    files = list(Path(args.model).glob("*.safetensors")) if getattr(args, "model", None) else []
    if not files:  # none, or one of the hub's
        return False
    from esft.memory import free_memory
    from esft_kernels.formats.resolve import FORMATS

    size = 0
    for file in files:
        with suppress(OSError):  # of a file that cannot be looked at, the stage that reads it tells
            size += file.stat().st_size
    frozen = getattr(args, "frozen", None)
    share = FORMATS[frozen].nbytes(1, 1024, 1024) / (2 * 1024**2) if frozen in FORMATS else 1  # of 16 bits a weight
    return free_memory() < PLENTY * share * size

"""Tile sizes by architecture and dtype, and the tile schedule of a grouped GEMM.

Plain Python and torch: what is chosen for a GPU can be asked, and tested, on a machine without one.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


Op = Literal["up", "gemm", "grad", "wgrad"]
# Streaming multiprocessors or compute units of the GPUs that the tables were made for.
PROCESSORS = {"sm_80": 108, "sm_89": 128, "sm_90": 132, "sm_100": 148, "sm_120": 170, "gfx942": 304, "gfx950": 256}


@dataclass(frozen=True)
class Tiles:
    """One program computes ``block_m x block_n`` of the output, ``block_k`` of the reduction at a time.

    In the GEMMs over rows m is rows, n output features, k input features; in a weight gradient m and n are the two
    feature dimensions of the weight and k is rows.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int = 8  # row tiles that walk over the output features together, to share weights in the L2 cache
    descriptors: bool = False  # weights, and rows that lie together, are loaded by descriptors where these can
    persistent: int = 0  # programs per processor that make all tiles of a GEMM over rows; 0: one program for each tile
    ahead: bool = False  # of the backward GEMM: H is loaded before its products are made, and takes registers meanwhile

    def launch_options(self) -> dict[str, int]:
        return {
            "GROUP_M": self.group_m, "BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "BLOCK_K": self.block_k,
            "num_warps": self.num_warps, "num_stages": self.num_stages,
        }  # fmt: skip


@cache
def device_arch(device: torch.device) -> str:
    """``sm_90``, ``gfx942`` and so on; ``interpreter`` for CPU tensors."""
    if device.type == "cpu":
        return "interpreter"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


Chooser = Callable[[str, torch.dtype, Op, int, tuple[int, int]], Tiles]
_chooser: Chooser | None = None  # no context variable: on a GPU a backward runs in a thread of its own


@contextmanager
def chosen_by(chooser: Chooser) -> Iterator[None]:
    """Inside, tiles are what a function with the arguments of ``choose_tiles`` says: for tuning, and for tests."""
    global _chooser
    before, _chooser = _chooser, chooser
    try:
        yield
    finally:
        _chooser = before


def tiles_for(tensor: Tensor, op: Op, rows_per_expert: int, features: tuple[int, int], decodes: bool = False) -> Tiles:
    """Tiles for the device and dtype of a tensor: those that a GPU was tuned to, else ``choose_tiles``.

    ``decodes``: for weights that are decoded as they are loaded, see ``decoding``.
    """
    question = device_arch(tensor.device), tensor.dtype, op, rows_per_expert, features
    found = usual_tiles(tensor.device, *question) if _chooser is None else _chooser(*question)
    return decoding(found, tensor.dtype) if decodes else found


@cache  # a step asks six times a layer, and with few tokens the host's time is the step's
def usual_tiles(
    device: torch.device, arch: str, dtype: torch.dtype, op: Op, rows_per_expert: int, features: tuple[int, int]
) -> Tiles:
    """Tiles of a device outside of ``chosen_by``."""
    key = tile_key(arch, dtype, op, rows_per_expert, features)
    return tuned(device).get(key) or choose_tiles(arch, dtype, op, rows_per_expert, features)


def decoding(tiles: Tiles, dtype: torch.dtype) -> Tiles:
    """The tiles of a launch that decodes weights as it loads them.

    The codes that a pipeline has ahead wait in registers then, where their weights are made: turns are shorter, stages
    fewer, and warps more where the tile is large. ``block_n`` stays, because launches share what they number by it.
    """
    tiles = replace(tiles, num_stages=min(tiles.num_stages, 2), ahead=False)
    if dtype == torch.float32:
        return replace(tiles, block_m=min(tiles.block_m, 32), block_k=min(tiles.block_k, 16))
    large = tiles.block_m * tiles.block_n >= 4096
    block_k, warps = min(tiles.block_k, 16 if large else 32), 8 if large else 4
    return replace(tiles, block_k=block_k, num_warps=warps)


def tile_key(arch: str, dtype: torch.dtype, op: Op, rows_per_expert: int, features: tuple[int, int]) -> str:
    """What tuned tiles are kept under; row counts of one power of two share them."""
    return f"{arch} {dtype} {op} {rows_per_expert.bit_length()} {features[0]}x{features[1]}"


@cache
def tuned(device: torch.device) -> dict[str, Tiles]:
    """Tiles that a GPU was tuned to: of the file that ESFT_TILES names, or else of ``tuned_file``.

    Where a GPU has neither, a warning says once how to tune. Raises ValueError naming the file when it is not such one.
    """
    named = os.environ.get("ESFT_TILES")
    if not named and device.type != "cuda":
        return {}
    path = Path(named) if named else tuned_file(device)
    if not named and not path.exists():
        gpu = torch.cuda.get_device_name(device)
        warnings.warn(
            f"{gpu}: no tiles were tuned; `python -m benchmarks tune` finds the fastest and keeps them in {path}",
            stacklevel=2,
        )
        return {}
    try:
        return {key: Tiles(**values) for key, values in json.loads(path.read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{f'ESFT_TILES={named}' if named else path}: not a file of tuned tiles ({error})") from error


def tuned_file(device: torch.device) -> Path:
    """Where the tiles of a GPU are kept, in the user's cache, by its name and Triton's version."""
    name = "-".join(re.findall(r"\w+", torch.cuda.get_device_name(device)))
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "esft" / "tiles" / f"{name}-triton-{version('triton')}.json"


def choose_tiles(arch: str, dtype: torch.dtype, op: Op, rows_per_expert: int, features: tuple[int, int]) -> Tiles:
    """Tiles for one of the GEMMs.

    Loaded by pointers, a program each: on an H200 no other way to load and to walk was faster (docs/gpu.md). There
    some tiles of sm_90 were measured, for 16 bits and from 384 rows on; the others are computed. Tuning tries others.

    Args:
        arch: from ``device_arch``.
        op: ``up`` counts n in columns of H; ``grad`` holds twice its n columns of H besides; ``gemm`` is the plain
            one; ``wgrad`` a weight gradient.
        rows_per_expert: about how many rows an expert holds; a weight gradient's tiles do not depend on it.
        features: output and input features of one expert's weight matrix.

    Raises ValueError for a dtype that the kernels do not compute in.
    """
    if dtype not in DTYPES:
        raise ValueError(f"backend 'triton' computes in bfloat16, float16 or float32, got {dtype}")
    if arch == "interpreter":  # small and of three sizes, so that small tests meet many tiles and every edge
        return Tiles(32, 64, 16, 4, 1) if op == "wgrad" else Tiles(16, 32, 64, num_warps=4, num_stages=1)
    few = op != "wgrad" and rows_per_expert <= 32
    if dtype == torch.float32:  # exact fp32 runs on the plain ALUs: tiles are bound by registers
        return Tiles(16 if few else 64, 32 if op == "grad" else 64, 16, num_warps=8, num_stages=2)
    if any(size % 16 for size in features):
        # Rows that start anywhere are loaded element by element, each with its address and predicate in registers.
        return Tiles(16 if few else 64, 32 if op == "grad" else 64, 32, num_warps=8, num_stages=2)
    if arch.startswith("gfx"):
        full = Tiles(128, 128, 64, num_warps=8, num_stages=2)
    elif arch == "sm_90":  # 227 KiB of shared memory
        full = Tiles(128, 256, 64, num_warps=8, num_stages=4)
    elif arch in ("sm_80", "sm_100", "sm_103"):  # 163 KiB and more
        full = Tiles(128, 128, 64, num_warps=8, num_stages=3)
    else:  # 99 KiB
        full = Tiles(128, 128, 32, num_warps=8, num_stages=3)
    if op == "wgrad" and arch == "sm_90":  # longer turns: a turn's addresses and barriers take issue slots
        return replace(full, block_k=128, num_stages=3)
    if op == "wgrad":  # two loads, the rows after their indices, share the stages of the pipeline
        return full if arch.startswith("gfx") else replace(full, num_stages=2 * full.num_stages - 1)
    if op == "grad":  # the epilogue holds H and its gradient, twice as wide, beside the accumulator
        full = replace(full, block_n=128)
        if arch == "sm_90":
            full = replace(full, block_k=128, num_stages=3, ahead=True)
    if rows_per_expert >= (768 if arch != "sm_90" else 512 if op == "grad" else 128):
        return full
    # Half a row tile per expert is padding on average, so few rows per expert want short tiles: below a tenth of all
    # rows from 320 an expert on. With fewer the weights' bytes bound the time on every GPU here, not the padding. But
    # short ones are slow on sm_90: with 384 rows an expert large ones, padding and all, take two thirds of their time;
    # in the fused backward as much.
    block_n = 64 if few and op in ("up", "grad") else min(full.block_n, 128)  # with few rows registers go to occupancy
    return replace(
        full,
        block_m=16 if few else 64,
        block_n=block_n,
        block_k=64,
        num_warps=4,
        num_stages=min(full.num_stages, 3),
        ahead=False,
    )


def programs_for(tensor: Tensor, tiles: Tiles, count: int) -> int:
    """How many programs make ``count`` tiles on the device of a tensor."""
    return min(count, tiles.persistent * processors(tensor.device)) if tiles.persistent else count


def processors(device: torch.device) -> int:
    """Streaming multiprocessors or compute units; three in the interpreter, so that a program makes several tiles."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return PROCESSORS.get(device_arch(device), 3)


def variants(tiles: Tiles, op: Op, arch: str) -> dict[str, Tiles]:
    """Other ways to load and to walk over the same tiles, by name.

    Weight gradients have no persistent one: their tiles take as many turns as their experts have rows, and a grid's
    programs go to whichever processor is free.
    """
    found = {}
    if op == "grad":
        found["H later" if tiles.ahead else "H ahead"] = replace(tiles, ahead=not tiles.ahead)
    if arch == "interpreter" or (arch.startswith("sm_") and int(arch[3:]) >= 90):
        found["descriptors"] = replace(tiles, descriptors=True)
        if op == "grad" and arch == "sm_90" and tiles.block_m >= 64 and tiles.block_k >= 64:
            # Wide, for long matrix instructions, and short, for H and its gradient to fit the registers.
            found["long turns"] = Tiles(64, 256, 128, 4, 2, tiles.group_m, descriptors=True)
        elif tiles.block_k <= 64:  # a turn's barriers cost the same however long it is
            found["long turns"] = replace(found["descriptors"], block_k=2 * tiles.block_k, num_stages=2)
    if op != "wgrad":
        # As many as the registers of a processor hold, more or less.
        ways = {"persistent": tiles} | {f"persistent {name}": t for name, t in found.items()}
        if op == "grad":  # its epilogue leaves the others too few registers for a loop around it
            ways = {name: replace(t, ahead=False) for name, t in ways.items() if name == "persistent descriptors"}
        found |= {name: replace(t, persistent=max(8 // t.num_warps, 1)) for name, t in ways.items()}
    return found


def varied(name: str) -> AbstractContextManager[None]:
    """Inside, tiles are this one of the ``variants`` of ``choose_tiles``, or its own where they have no such."""

    def choose(arch: str, dtype: torch.dtype, op: Op, rows_per_expert: int, features: tuple[int, int]) -> Tiles:
        chosen = choose_tiles(arch, dtype, op, rows_per_expert, features)
        return variants(chosen, op, arch).get(name, chosen)

    return chosen_by(choose)


def splits_for(tensor: Tensor, programs: int) -> int:
    """``choose_splits`` for the device of a tensor."""
    return choose_splits(device_arch(tensor.device), programs)


def choose_splits(arch: str, programs: int) -> int:
    """Into how many pieces the rows of a weight gradient are split, so that few large experts fill the GPU.

    Each piece is a sum of its own in fp32, and the pieces are added in order afterwards: worth it only where the
    weight's tiles alone leave most of the processors idle.
    """
    if arch == "interpreter":
        return 1 if programs > 8 else 2  # both ways for the tests
    return max(1, min(8, PROCESSORS.get(arch, 128) // max(programs, 1)))


def cdiv(count: int, block: int) -> int:
    """How many blocks hold ``count``. Triton's own is for kernels, and takes the host ten times as long."""
    return -(-count // block)


def next_power_of_2(count: int) -> int:
    """The smallest power of two that is not below a positive ``count``."""
    return 1 << (count - 1).bit_length()


def max_row_tiles(num_rows: int, num_positions: int, block_m: int) -> int:
    """How many row tiles the schedule has: known from sizes alone, without asking the device for the offsets."""
    return num_rows // block_m + num_positions


def tile_schedule(offsets_P1: Tensor, block_m: int) -> tuple[Tensor, Tensor]:
    """Expert position and first row of every row tile, int64 [max_row_tiles] each.

    The tiles of position e are numbered from ``offsets[e] // block_m + e`` on, less what that is for e = 0. That grants
    it one tile more than the whole tiles between its offsets, which always covers its rows, and the number of a tile's
    expert is a count over the offsets: no scan, no table, no host sync. A tile that starts at or past its expert's end
    is empty. This is the twin of the lookup inside the kernels (``find_row_tile``).
    """
    num_positions = offsets_P1.numel() - 1
    num_tiles = max_row_tiles(int(offsets_P1[-1]), num_positions, block_m)
    tile = torch.arange(num_tiles, device=offsets_P1.device) + offsets_P1[0] // block_m
    first_P1 = offsets_P1 // block_m + torch.arange(num_positions + 1, device=offsets_P1.device)
    position = torch.searchsorted(first_P1[1:], tile, right=True)
    return position, offsets_P1[position] + (tile - first_P1[position]) * block_m

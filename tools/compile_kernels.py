"""Compile every Triton kernel for GPUs that are not here, and check what came out.

``python -m tools.compile_kernels [--targets sm_90,gfx942] [--models deepseek-v2-lite,odd] [--dtypes bf16]
[--formats plain,nf4] [--variants chosen,descriptors] [--rows 64,many]``

The backend itself is run on meta tensors with launches turned into compilations, so what is compiled is what a
real step of that model would launch: same tiles, same specialisation of sizes, strides and missing pointers.
Fails on a compile error, a register spill, more shared memory than the chip has, or a 16-bit or tf32 GEMM without the
target's matrix instructions in its main loop. What tf32 leaves as fp32 (a kernel without a product, a chip without
tf32) is compiled as that.

Columns: registers per thread; bytes of local memory (stack) and instructions that spill to it; bytes of shared memory;
programs that fit a processor at once; matrix and other instructions in one turn of the main loop, and how many of the
latter load a tile by a descriptor (UTMALDG); and, for sm_90, the issue slots that the others leave free: a turn's
matrix work takes tile FLOPs / 4096 cycles (the dense 16-bit peak of a processor), in which its four schedulers issue
one instruction a cycle each, and every warp issues the others once. A tile is "wide" that reaches rows by 64-bit
offsets, for tensors of 2**31 elements or more.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import product
from math import ceil
from operator import attrgetter
from unittest.mock import patch

import torch
import triton
from torch import nn
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from benchmarks.shapes import SHAPES, LayerShape
from esft.optimizer.masters import master_type
from esft.optimizer.moments import FloatMoments
from esft_kernels.activation import Activation
from esft_kernels.adamw import adamw_step
from esft_kernels.backend import Needs
from esft_kernels.backends import triton_backend
from esft_kernels.formats.resolve import FORMATS
from esft_kernels.pools import PLAIN, ExpertPools, ExpertWeights, QuantizedWeights
from esft_kernels.triton_ops import tiles
from esft_kernels.triton_ops.tiles import Tiles, variants, varied
from tools.sass import read

# Every activation and width that a layer can have, on a small layer; gpt-oss has its own.
MODELS = SHAPES | {
    f"tiny-{name}": replace(SHAPES["tiny"], activation=activation)
    for name, activation in {
        "gelu": Activation("gelu"),
        "gelu_tanh": Activation("gelu_tanh"),
        "relu2": Activation("relu2", gated=False),
        "ungated": Activation("silu", gated=False),
    }.items()
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}
LAYOUTS = (PLAIN, "int8", "nf4", "fp8", "mxfp4")  # nf4_double is nf4 to the kernels
TARGETS = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950")
VARIANTS = (
    "chosen",
    *dict.fromkeys(name for op in ("gemm", "grad") for name in variants(Tiles(64, 64, 64, 8, 2), op, "sm_90")),
)
# Rows of an expert: between them they meet every tile that a model can get. With far less than one, loads decode the
# weights; many are more elements than 32-bit offsets reach.
ROWS = ("0.1", "8", "64", "1024", "many")


@dataclass(frozen=True)
class Chip:
    """What one processor (SM or CU) has. From the vendors' tuning guides."""

    shared_limit: int  # bytes that one program can have
    shared: int  # bytes in all
    warps: int  # most at once
    matrix: tuple[str, ...]  # its matrix instructions


CHIPS = {
    "sm_80": Chip(166_912, 167_936, 64, ("HMMA",)),
    "sm_89": Chip(101_376, 102_400, 48, ("HMMA",)),
    "sm_90": Chip(232_448, 233_472, 64, ("HGMMA", "HMMA")),  # wgmma wants 64 rows: shorter tiles run on mma
    "sm_100": Chip(232_448, 233_472, 64, ("UTCHMMA", "HMMA")),
    "sm_120": Chip(101_376, 102_400, 48, ("HMMA",)),
    "gfx942": Chip(65_536, 65_536, 32, ("V_MFMA",)),
    "gfx950": Chip(163_840, 163_840, 32, ("V_MFMA",)),
}
SM_90_FLOPS_PER_CYCLE = 4096


@dataclass(frozen=True)
class Row:
    kernel: str
    target: str
    dtype: str
    format: str  # that weights are decoded from
    tile: str
    registers: int
    stack: int
    spills: int
    shared: int
    programs: int  # that fit a processor at once
    matrix: str
    loop_matrix: int
    loop_others: int
    loop_tiles: int
    described: bool  # whether something is loaded by a descriptor
    slots: str  # share of the issue slots free for matrix instructions

    def problems(self) -> list[str]:
        chip, found = CHIPS[self.target], []
        if self.spills or self.stack:
            found.append(f"spills {self.spills}, stack {self.stack}")
        if self.shared > chip.shared_limit:
            found.append(f"{self.shared} bytes of shared memory, {self.target} has {chip.shared_limit}")
        if self.kernel.endswith(("gemm", "wgrad")) and self.dtype != "fp32":
            rows = int(self.tile.split("x")[0])
            wanted = chip.matrix[:1] if rows >= 64 else chip.matrix
            if not self.matrix.startswith(wanted) or not self.loop_matrix:
                found.append(f"no {wanted[0]} in the main loop")
        if self.described and not self.loop_tiles:
            found.append("no UTMALDG in the main loop")
        return found


def gpu_target(name: str) -> GPUTarget:
    return GPUTarget("cuda", int(name[3:]), 32) if name.startswith("sm_") else GPUTarget("hip", name, 64)


class OfflineDriver:
    """As much of a Triton driver as compiling needs. The target's name serves as the device's number."""

    def __init__(self, name: str) -> None:
        self.name, self.target = name, gpu_target(name)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return self.name

    def get_current_stream(self, device: str) -> int:
        return 0


@contextmanager
def compiling_for(target: str) -> Iterator[dict[str, CompiledKernel]]:
    """Inside, a kernel launch compiles for the target instead; yields the compiled kernels by their hash."""
    compiled: dict[str, CompiledKernel] = {}
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        assert isinstance(kernel, CompiledKernel)
        compiled[kernel.hash] = kernel
        return kernel

    with ExitStack() as stack:
        stack.enter_context(patch.object(JITFunction, "run", compile_only))
        stack.enter_context(patch.object(triton.runtime.driver, "_active", OfflineDriver(target)))
        stack.enter_context(patch.object(tiles, "device_arch", lambda device: target))
        yield compiled


@contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    """Inside, PyTorch allows what fp32 products may lose, or does not."""
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, name
    try:
        yield
    finally:
        matmul.fp32_precision = before


def launch_all(shape: LayerShape, dtype: torch.dtype, format: str, rows: Sequence[str]) -> None:
    """Every launch that a training step of this layer can make, on tensors without storage.

    ``format``: of the frozen pool. ``rows``: of ``ROWS``.
    """

    def meta(*size: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    d, f, g = shape.hidden, shape.intermediate, shape.intermediate * shape.activation.width

    def pool(n: int) -> ExpertWeights:
        if shape.gpt_oss_layout:
            return ExpertWeights(meta(n, d, g).mT, meta(n, f, d).mT, meta(n, g), meta(n, d))
        return ExpertWeights(meta(n, g, d), meta(n, d, f))

    def quantized(n: int) -> QuantizedWeights:
        gate_up, down = (
            tuple(meta(*size, dtype=kind) for size, kind in FORMATS[format].layout(n, *rows_columns).values())
            for rows_columns in ((g, d), (d, f))
        )
        biases = (meta(n, g), meta(n, d)) if shape.gpt_oss_layout else ()
        return QuantizedWeights(format, (g, d, f), gate_up, down, *biases)

    s = max(shape.experts // 8, 2)
    frozen = pool(shape.experts - s) if format == PLAIN else quantized(shape.experts - s)
    pools = ExpertPools(pool(s), frozen, shape.activation, shape.gpt_oss_layout)
    for weight in pools.trained.tensors():
        if weight is not None:
            launch_update(weight.numel(), dtype)
    k = shape.top_k
    for name in rows:
        t = 1 << 20 if name == "many" else ceil(float(name) * shape.experts / k)
        index, position = meta(t, k, dtype=torch.int64), meta(shape.experts, dtype=torch.int64)
        adapters = meta(t, dtype=torch.int64)
        triton_backend.route(index, position.view(1, -1), s, False, shape.experts, adapters)
        routing = triton_backend.route(index, position, s)
        x, weights = meta(t, d), meta(t, k, dtype=torch.float32)
        for keep in (0, t * k):
            _, h = triton_backend.forward(x, weights, pools, routing, keep)
        triton_backend.rebuild(x, h[: t * k // 4], pools, routing)
        for needs in (Needs(True, True, True), Needs(True, True, False), Needs(True, False, True),
                      Needs(False, True, True), Needs(False, False, True)):  # fmt: skip
            triton_backend.backward(x, x, h, weights, pools, routing, needs)


def launch_update(count: int, dtype: torch.dtype) -> None:
    """The launch that steps a parameter of so many elements, with its master."""
    weight = torch.empty(count, dtype=dtype, device="meta")
    adamw_step(
        *master_type(dtype)(nn.Parameter(weight)).parts(slice(None)), weight, *FloatMoments(weight).read(slice(None)),
        torch.empty((), device="meta"), 1, lr=1e-4, beta1=0.9, beta2=0.95, weight_decay=0.1, eps=1e-8,
    )  # fmt: skip


def programs_at_once(target: str, registers: int, shared: int, warps: int) -> int:
    chip = CHIPS[target]
    if target.startswith("sm_"):
        by_registers = 65_536 // (-(-registers // 8) * 8 * 32 * warps)
        by_shared = chip.shared // (shared + 1024)  # the driver keeps 1 KB of it for every program
    else:  # four SIMDs of 512 registers a lane
        by_registers = 4 * min(8, 512 // max(-(-registers // 8) * 8, 1)) // warps
        by_shared = chip.shared // max(shared, 1)
    return min(by_registers, by_shared, chip.warps // warps)


def inspect(kernel: CompiledKernel, target: str) -> Row:
    code, source, options = read(kernel, target), kernel.src, kernel.metadata
    sizes = {source.fn.arg_names[path[0]]: value for path, value in source.constants.items()}
    blocks = [sizes[f"BLOCK_{letter}"] for letter in "MNKFD" if f"BLOCK_{letter}" in sizes]
    dtype = next(kind[1:] for kind in source.signature.values() if kind.startswith("*"))
    if sizes.get("PRECISION") == "tf32":
        dtype = "tf32"
    slots = ""
    if target == "sm_90" and code.loop.matrix and not dtype.endswith("32"):
        cycles = 2 * blocks[0] * blocks[1] * blocks[2] / SM_90_FLOPS_PER_CYCLE
        slots = f"{1 - code.loop.others * options.num_warps / (4 * cycles):.0%}"
    return Row(
        kernel=kernel.name.strip("_").removesuffix("_kernel"),
        target=target,
        dtype=dtype,
        format=sizes.get("FORMAT", PLAIN),
        tile=f"{'x'.join(map(str, blocks))} w{options.num_warps} s{options.num_stages}"
        + " wide" * bool(sizes.get("WIDE"))
        + " persistent" * bool(sizes.get("PERSISTENT")),
        registers=code.registers,
        stack=code.stack,
        spills=code.spills,
        shared=options.shared,
        programs=programs_at_once(target, code.registers, options.shared, options.num_warps),
        matrix=code.matrix,
        loop_matrix=code.loop.matrix,
        loop_others=code.loop.others,
        loop_tiles=code.loop.tiles,
        described=any(sizes.get(name) for name in ("LAYOUT", "ROW_TILES", "GRAD_TILES")),
        slots=slots,
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="compile_kernels", description="Compile every Triton kernel for GPUs that are not here."
    )
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--dtypes", default=",".join(DTYPES))
    parser.add_argument("--formats", default=",".join(LAYOUTS))
    parser.add_argument("--variants", default="chosen", help="of the tiles, see esft_kernels.triton_ops.tiles")
    parser.add_argument("--rows", default=",".join(ROWS), help="of an expert")
    args = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("unset TRITON_INTERPRET, which replaces the compiler by an interpreter")
    for option, known in (("targets", TARGETS), ("models", MODELS), ("dtypes", DTYPES), ("formats", LAYOUTS),
                          ("variants", VARIANTS), ("rows", ROWS)):  # fmt: skip
        if unknown := [name for name in getattr(args, option).split(",") if name not in known]:
            parser.error(f"--{option} takes {', '.join(known)}, got {', '.join(unknown)}")
    rows: dict[str, Row] = {}
    failures = []
    for target in args.targets.split(","):
        with compiling_for(target) as compiled:
            for name in args.models.split(","):
                settings = (getattr(args, option).split(",") for option in ("dtypes", "formats", "variants"))
                for dtype, format, variant in product(*settings):
                    try:
                        with matmul_precision("tf32" if dtype == "tf32" else "ieee"), varied(variant):
                            launch_all(MODELS[name], DTYPES[dtype], format, args.rows.split(","))
                    except Exception as error:  # whatever the compiler raised: report it and go on
                        failures.append(f"{target} {dtype} {format} {variant} {name}: {type(error).__name__}: {error}")
        rows |= {key: inspect(kernel, target) for key, kernel in compiled.items()}
    failures += print_table(rows)
    for failure in failures:
        print(f"FAILED {failure}")
    print(f"{len(rows)} kernels compiled for {args.targets}: {len(failures)} problems")
    return 1 if failures else 0


def print_table(rows: dict[str, Row]) -> list[str]:
    """One line for all variants that came out alike. Returns the problems found."""
    layout = "{:14} {:7} {:5} {:6} {:34} {:>9} {:>5} {:>6} {:>7} {:>8} {:>8}  {:24} {:>11} {:>6} {:>7} {:>5}"
    print(layout.format(
        "kernel", "target", "dtype", "format", "tile", "registers", "stack", "spills", "shared", "programs", "variants",
        "matrix instruction", "matrix/turn", "others", "UTMALDG", "slots",
    ))  # fmt: skip
    failures = []
    order = attrgetter(
        "target", "kernel", "dtype", "format", "tile", "registers", "matrix", "loop_others", "loop_tiles"
    )
    for row, count in sorted(Counter(rows.values()).items(), key=lambda item: order(item[0])):
        r = row
        print(layout.format(
            r.kernel, r.target, r.dtype, r.format, r.tile, r.registers, r.stack, r.spills, r.shared, r.programs, count,
            r.matrix, r.loop_matrix, r.loop_others, r.loop_tiles, r.slots,
        ))  # fmt: skip
        failures += [
            f"{row.target} {row.dtype} {row.format} {row.kernel} {row.tile}: {problem}" for problem in row.problems()
        ]
    return failures


if __name__ == "__main__":
    sys.exit(main())

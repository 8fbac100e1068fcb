"""Compile every Triton kernel for GPUs that are not here, and check what came out.

``python -m tools.compile_kernels [--targets sm_80,sm_90,gfx942] [--models deepseek-v2-lite,small,odd] [--dtypes bf16]``

The backend itself is run on meta tensors with launches turned into compilations, so what is compiled is what a
real step of that model would launch: same tiles, same specialisation of sizes, strides and missing pointers.
Fails on a compile error, a register spill, more shared memory than the chip has, or a 16-bit GEMM without
matrix instructions.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from operator import attrgetter
from unittest.mock import patch

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from esft_kernels import grouped_gemm, grouped_wgrad, triton_backend
from esft_kernels.pools import ExpertPools, Needs
from esft_kernels.routing import Routing

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SHARED_LIMIT = {  # bytes of shared memory (LDS) that one program can have
    "sm_80": 166_912, "sm_86": 101_376, "sm_89": 101_376, "sm_90": 232_448, "sm_100": 232_448, "sm_103": 232_448,
    "sm_120": 101_376, "gfx942": 65_536, "gfx950": 163_840,
}  # fmt: skip
MATRIX_INSTRUCTION = re.compile(r"\b(HMMA|HGMMA|UTCHMMA|IMMA|v_s?mfma)\w*", re.IGNORECASE)


@dataclass(frozen=True)
class Model:
    """A layer's sizes, and token counts that between them meet every tile that it can get."""

    hidden: int
    intermediate: int
    experts: int
    top_k: int
    tokens: tuple[int, ...]


MODELS = {
    "deepseek-v2-lite": Model(2048, 1408, 64, 6, tokens=(128, 4096, 16384)),
    "small": Model(256, 128, 32, 4, tokens=(64,)),
    "odd": Model(100, 36, 7, 2, tokens=(512,)),  # sizes that no vector load divides
}


@dataclass(frozen=True)
class Row:
    kernel: str
    target: str
    dtype: str
    tile: str
    registers: int
    spills: int
    shared: int
    matrix: str

    def problems(self) -> list[str]:
        found = []
        if self.spills:
            found.append(f"spills {self.spills}")
        if self.shared > SHARED_LIMIT[self.target]:
            found.append(f"{self.shared} bytes of shared memory, {self.target} has {SHARED_LIMIT[self.target]}")
        if self.kernel.startswith("grouped_") and self.dtype != "fp32" and not self.matrix:
            found.append("no matrix instructions")
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
        for module in (grouped_gemm, grouped_wgrad):
            stack.enter_context(patch.object(module, "device_arch", lambda device: target))
        yield compiled


def launch_all(model: Model, dtype: torch.dtype) -> None:
    """Every launch that a training step of this layer can make, on tensors without storage."""

    def meta(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    d, f, e, k = model.hidden, model.intermediate, model.experts, model.top_k
    s = max(e // 8, 2)
    pools = ExpertPools(meta(s, 2 * f, d), meta(s, d, f), meta(e - s, 2 * f, d), meta(e - s, d, f))
    for t in model.tokens:
        index = meta(t * k, dtype=torch.int64)
        routing = Routing(index, index, index.view(t, k), meta(e + 1, dtype=torch.int64), s)
        x, weights = meta(t, d), meta(t, k, dtype=torch.float32)
        _, h = triton_backend.forward(x, weights, pools, routing)
        for needs in (Needs(True, True, True), Needs(True, True, False), Needs(True, False, True),
                      Needs(False, True, True), Needs(False, False, True)):  # fmt: skip
            triton_backend.backward(x, x, h, weights, pools, routing, needs)


def inspect(kernel: CompiledKernel, target: str) -> Row:
    """What the compiled code holds; the counts of matrix instructions are of the whole kernel."""
    if target.startswith("sm_"):
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            command = [knobs.nvidia.cuobjdump.path, "-sass", "-res-usage", file.name]
            text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        usage = re.search(r"REG:(\d+) STACK:(\d+)", text)
        assert usage, f"cuobjdump told no register count:\n{text[:2000]}"
        registers, spills = int(usage[1]), max(int(usage[2]), len(re.findall(r"\bSTL\b", text)))
    else:
        text = kernel.asm["amdgcn"]
        fields = {name: int(n) for name, n in re.findall(r"\.(\w+_count|\w+_segment_fixed_size):\s+(\d+)", text)}
        registers = fields["vgpr_count"] + fields.get("agpr_count", 0)
        spills = max(fields["vgpr_spill_count"], fields["sgpr_spill_count"], fields["private_segment_fixed_size"])
    matrix = Counter(name.upper() for name in MATRIX_INSTRUCTION.findall(text))
    source = kernel.src
    sizes = {source.fn.arg_names[path[0]]: value for path, value in source.constants.items()}
    tile = "x".join(str(sizes[f"BLOCK_{letter}"]) for letter in "MNKFD" if f"BLOCK_{letter}" in sizes)
    options = kernel.metadata
    return Row(
        kernel=kernel.name.strip("_").removesuffix("_kernel"),
        target=target,
        dtype=next(kind[1:] for kind in source.signature.values() if kind.startswith("*")),
        tile=f"{tile} w{options.num_warps} s{options.num_stages}",
        registers=registers,
        spills=spills,
        shared=options.shared,
        matrix=" ".join(f"{count} {name}" for name, count in matrix.items()),
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="compile_kernels", description="Compile every Triton kernel for GPUs that are not here."
    )
    parser.add_argument("--targets", default="sm_80,sm_90,gfx942")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--dtypes", default=",".join(DTYPES))
    args = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("unset TRITON_INTERPRET, which replaces the compiler by an interpreter")
    for option, known in (("targets", SHARED_LIMIT), ("models", MODELS), ("dtypes", DTYPES)):
        if unknown := [name for name in getattr(args, option).split(",") if name not in known]:
            parser.error(f"--{option} takes {', '.join(known)}, got {', '.join(unknown)}")
    rows: dict[str, Row] = {}
    failures = []
    for target in args.targets.split(","):
        with compiling_for(target) as compiled:
            for name in args.models.split(","):
                for dtype in args.dtypes.split(","):
                    try:
                        launch_all(MODELS[name], DTYPES[dtype])
                    except Exception as error:  # whatever the compiler raised: report it and go on
                        failures.append(f"{target} {dtype} {name}: {type(error).__name__}: {error}")
        rows |= {key: inspect(kernel, target) for key, kernel in compiled.items()}

    layout = "{:16} {:7} {:5} {:18} {:>9} {:>6} {:>7} {:>8}  {}"
    print(layout.format(
        "kernel", "target", "dtype", "tile", "registers", "spills", "shared", "variants", "matrix instructions"
    ))  # fmt: skip
    order = attrgetter("target", "kernel", "dtype", "tile", "registers", "matrix")
    for row, count in sorted(Counter(rows.values()).items(), key=lambda item: order(item[0])):
        *values, matrix = vars(row).values()
        print(layout.format(*values, count, matrix))
        failures += [f"{row.target} {row.dtype} {row.kernel} {row.tile}: {problem}" for problem in row.problems()]
    for failure in failures:
        print(f"FAILED {failure}")
    print(f"{len(rows)} kernels compiled for {args.targets}: {len(failures)} problems")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

"""What one layer's training step costs on paper: FLOPs and bytes of every kernel from its launch, and the time that a
GPU's peaks allow. Everything here is computed; nothing is measured.

Counted as launched: every size is padded to the tiles, and a row or weight block that another tile of its group has
read comes from the L2 cache. So per group of ``group_m`` row tiles an expert's weights are read once, and so are the
rows. Tensors that a kernel writes are written once. Index tables, row sums and the pieces of split sums are left out:
about one part in a hundred.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.shapes import LayerShape
from esft_kernels.triton_ops.tiles import Op, Tiles, choose_tiles

SIZE = 2  # bytes of a bf16 element


@dataclass(frozen=True)
class GPU:
    """Dense bf16 peak with fp32 accumulation, and memory bandwidth, from the vendor's data sheet."""

    arch: str
    flops: float
    bandwidth: float


GPUS = {
    "A100": GPU("sm_80", 312e12, 2.039e12),
    "H100": GPU("sm_90", 989e12, 3.35e12),
    "H200": GPU("sm_90", 989e12, 4.8e12),
    "B200": GPU("sm_100", 2250e12, 8.0e12),
    "RTX 4090": GPU("sm_89", 165e12, 1.008e12),
    "MI300X": GPU("gfx942", 1307e12, 5.3e12),
}


@dataclass(frozen=True)
class Pass:
    """One kernel: its name, FLOPs, and bytes to and from memory."""

    name: str
    flops: float
    bytes: float

    def seconds(self, gpu: GPU) -> float:
        return max(self.flops / gpu.flops, self.bytes / gpu.bandwidth)


def _up(size: int, block: int) -> int:
    return -(-size // block) * block


@dataclass(frozen=True)
class Launch:
    """A layer on a GPU with so many rows on every expert."""

    shape: LayerShape
    arch: str
    tokens: int
    rows_E: tuple[int, ...]

    @property
    def rows(self) -> int:
        return sum(self.rows_E)

    def tiles(self, op: Op, out: int, inner: int) -> Tiles:
        return choose_tiles(self.arch, torch.bfloat16, op, self.rows // len(self.rows_E), (out, inner))

    def gemm(self, name: str, op: Op, out: int, inner: int, other: float) -> Pass:
        """Rows x weights: reads rows [N, inner] and weights [out, inner], and moves ``other`` elements besides."""
        tiles = self.tiles(op, out, inner)
        row_tiles = [-(-n // tiles.block_m) for n in self.rows_E]
        flops = 2 * sum(row_tiles) * tiles.block_m * _up(out, tiles.block_n) * _up(inner, tiles.block_k)
        weights = sum(-(-n // tiles.group_m) for n in row_tiles) * out * inner
        return Pass(name, flops, SIZE * (self.rows * inner + weights + other))

    def wgrad(self, name: str, out: int, inner: int, trained_rows: tuple[int, ...]) -> Pass:
        """Gradient [out, inner] of every trained expert from rows [n, out] and [n, inner]."""
        tiles = self.tiles("wgrad", out, inner)
        padded = sum(_up(n, tiles.block_k) for n in trained_rows)
        groups = math.ceil(out / (tiles.block_m * tiles.group_m))  # each reads the rows of ``inner`` again
        read = sum(trained_rows) * (out + groups * inner)
        flops = 2 * padded * _up(out, tiles.block_m) * _up(inner, tiles.block_n)
        return Pass(name, flops, SIZE * (read + len(trained_rows) * out * inner))


Schedule = Callable[[Launch, int], list[Pass]]


def ours(launch: Launch, trained: int) -> list[Pass]:
    """The kernels of ``triton_backend``, with the first ``trained`` experts trained."""
    shape = launch.shape
    d, f, n, t = shape.hidden, shape.intermediate, launch.rows, launch.tokens
    g = f * shape.activation.width
    prefix = launch.rows_E[:trained]
    return [
        launch.gemm("up", "up", g, d, n * (g + f)),
        launch.gemm("down", "gemm", d, f, n * d),
        Pass("combine", 0, SIZE * (n * d + t * d)),
        launch.gemm("grad", "grad", f, d, n * 2 * g + sum(prefix) * f),
        launch.wgrad("dW up", g, d, prefix),
        launch.wgrad("dW down", d, f, prefix),
        launch.gemm("dX", "gemm", d, g, n * d),
        Pass("combine dX", 0, SIZE * (n * d + t * d)),
    ]  # fmt: skip


def all_trained(launch: Launch, trained: int) -> list[Pass]:
    """The same kernels with every expert trained. SonicMoE (arXiv 2512.14080) has the same passes, in its own tiles."""
    return ours(launch, len(launch.rows_E))


def unfused(launch: Launch, trained: int) -> list[Pass]:
    """A ScatterMoE-like schedule (arXiv 2403.08245): gather and scatter fused into the GEMMs of the forward, grouped
    copies of X and dO for the weight gradients, activation and routing weight as passes of their own, every dW."""
    shape = launch.shape
    d, f, n, t = shape.hidden, shape.intermediate, launch.rows, launch.tokens
    g = f * shape.activation.width
    return [
        launch.gemm("up", "gemm", g, d, n * g),
        Pass("activation", 0, SIZE * n * (g + f)),
        launch.gemm("down", "gemm", d, f, n * d),
        Pass("combine", 0, SIZE * (n * d + t * d)),
        Pass("routing weights' gradient", 0, SIZE * (n * d + t * d)),
        Pass("group dO", 0, SIZE * (t * d + n * d)),
        launch.gemm("dA", "gemm", f, d, n * f),
        launch.wgrad("dW down", d, f, launch.rows_E),
        Pass("activation backward", 0, SIZE * n * (2 * g + f)),
        Pass("group X", 0, SIZE * (t * d + n * d)),
        launch.wgrad("dW up", g, d, launch.rows_E),
        launch.gemm("dX", "gemm", d, g, n * d),
        Pass("combine dX", 0, SIZE * (n * d + t * d)),
    ]  # fmt: skip


SCHEDULES: dict[str, Schedule] = {"esft": ours, "all trained, SonicMoE-like": all_trained, "ScatterMoE-like": unfused}


def even_rows(shape: LayerShape, tokens: int, trained: int, share: float) -> tuple[int, ...]:
    """Rows of every expert: ``share`` of them spread evenly over the trained experts, the others over the frozen."""
    total = tokens * shape.top_k

    def spread(rows: int, experts: int) -> list[int]:
        return [rows // experts + (e < rows % experts) for e in range(experts)] if experts else []

    prefix = round(total * share) if trained < shape.experts else total
    return tuple(spread(prefix, trained) + spread(total - prefix, shape.experts - trained))


def compute(shape: LayerShape, tokens: int, trained: int, share: float) -> list[dict]:
    """A row for every GPU: computed milliseconds of each schedule, and how much longer the others take than ours."""
    rows_E, table = even_rows(shape, tokens, trained, share), []
    for name, gpu in GPUS.items():
        launch = Launch(shape, gpu.arch, tokens, rows_E)
        passes = {schedule: make(launch, trained) for schedule, make in SCHEDULES.items()}
        seconds = {schedule: sum(p.seconds(gpu) for p in made) for schedule, made in passes.items()}
        row: dict = {"shape": shape.name, "GPU": name}
        row |= {f"{schedule} ms (computed)": value * 1e3 for schedule, value in seconds.items()}
        row["all / esft"] = seconds["all trained, SonicMoE-like"] / seconds["esft"]
        row["ScatterMoE / esft"] = seconds["ScatterMoE-like"] / seconds["esft"]
        tiles = launch.tiles("up", shape.intermediate * shape.activation.width, shape.hidden)
        row["padded rows"] = f"{sum(_up(n, tiles.block_m) for n in rows_E) / launch.rows - 1:.1%}"
        row["TFLOP"] = sum(p.flops for p in passes["esft"]) / 1e12
        row["GB moved"] = sum(p.bytes for p in passes["esft"]) / 1e9
        table.append(row)
    return table


def passes_table(shape: LayerShape, tokens: int, trained: int, share: float, gpu: str) -> list[dict]:
    """Our kernels one by one on one GPU."""
    launch = Launch(shape, GPUS[gpu].arch, tokens, even_rows(shape, tokens, trained, share))
    return [
        {
            "kernel": p.name,
            "GFLOP": p.flops / 1e9,
            "MB": p.bytes / 1e6,
            "bound by": "FLOPs" if p.flops / GPUS[gpu].flops > p.bytes / GPUS[gpu].bandwidth else "memory",
            "us (computed)": p.seconds(GPUS[gpu]) * 1e6,
        }
        for p in ours(launch, trained)
    ]

"""Find the fastest tiles of a layer on the GPU at hand, and keep them in a file.

One kernel at a time: each candidate takes its place in the whole step, and the step is timed. A candidate that does not
fit the GPU is passed over; the winners together must agree with the reference before the file is written.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks import layer, peers
from benchmarks.shapes import LayerShape
from esft_kernels.triton_ops.tiles import Op, Tiles, choose_tiles, chosen_by, tile_key

MAX_ACCUMULATORS = 128  # fp32 registers of a thread's 255 that a tile may take for its sums


def candidates(first: Tiles, op: Op) -> list[Tiles]:
    """Tiles near the table's choice: each size halved, kept or doubled, within what registers hold."""

    def near(size: int, least: int) -> list[int]:
        return [s for s in (size // 2, size, size * 2) if s >= least]

    found = [
        Tiles(m, n, k, warps, stages, first.group_m)
        for m, n, k, warps, stages in itertools.product(
            near(first.block_m, 16), near(first.block_n, 32), near(first.block_k, 16), (4, 8), (2, 3, 4)
        )
        if m * n <= MAX_ACCUMULATORS * 32 * warps
    ]
    return [first, *(t for t in found if t != first)]


def using(table: dict[str, Tiles]) -> AbstractContextManager[None]:
    """Inside, the tiles of a table where it has the key, else those that would be chosen anyway."""
    return chosen_by(lambda *asked: table.get(tile_key(*asked)) or choose_tiles(*asked))


def asked(step, problem) -> dict[str, tuple[Op, Tiles]]:
    """What the step asks for: key -> operation and the choice."""
    found: dict[str, tuple[Op, Tiles]] = {}

    def choose(arch, dtype, op, rows, features):
        found[tile_key(arch, dtype, op, rows, features)] = op, choose_tiles(arch, dtype, op, rows, features)
        return found[tile_key(arch, dtype, op, rows, features)][1]

    with chosen_by(choose):
        step.run(problem)
    return found


def run(
    shape: LayerShape, tokens: int, dtype: torch.dtype, device: torch.device, rounds: int, out: str | Path
) -> list[dict]:
    """A row for every tuned kernel: its tiles, and the step's time with the table's choice and with the fastest.

    Raises RuntimeError when the step with the winners is wrong; the file is then not written.
    """
    problem = layer.make_problem(shape, tokens, dtype, device)
    step = peers.ours(problem, problem.chosen, "triton")
    best, rows = {}, []

    def seconds(table: dict[str, Tiles]) -> float:
        with using(table):
            times = layer.interleaved({"step": lambda: step.run(problem)}, rounds, device)["step"]
        return statistics.median(times)

    for key, (op, first) in asked(step, problem).items():
        before, fastest = seconds(best), None
        limit = before
        for candidate in candidates(first, op)[1:]:
            try:
                time = seconds(best | {key: candidate})
            except Exception as error:  # whatever the compiler or the driver says of a tile too large
                if "OutOfResources" not in type(error).__name__:
                    raise
                continue
            if time < limit:
                fastest, limit = candidate, time
        if fastest is not None:
            best[key] = fastest
        rows.append({"kernel": key, "tiles": str(fastest or first), "before ms": before * 1e3, "after ms": limit * 1e3})
    with using(best):
        layer.check(problem, dtype, "triton")
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    kept = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    temporary = out.with_suffix(".tmp")
    temporary.write_text(json.dumps(kept | {key: asdict(t) for key, t in best.items()}, indent=1), encoding="utf-8")
    os.replace(temporary, out)
    return rows

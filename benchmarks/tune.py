"""Find the fastest tiles of a layer on the GPU at hand, and keep them in a file.

One kernel at a time: each candidate takes its place in the whole step, whose results are held to the reference before
it is timed. A candidate that does not fit the GPU is passed over, and so is a wrong one, which the table names; the
winners together must agree with the reference before the file is written.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from pathlib import Path

import torch

from benchmarks import layer, peers
from benchmarks.shapes import LayerShape
from esft_kernels.triton_ops.tiles import Op, Tiles, choose_tiles, chosen_by, tile_key, variants

MAX_ACCUMULATORS = 128  # fp32 registers of a thread's 255 that a tile may take for its sums


def near(first: Tiles) -> list[Tiles]:
    """Tiles that differ in their sizes: each halved, kept or doubled, within what registers hold."""

    def sizes(size: int, least: int) -> list[int]:
        return [s for s in (size // 2, size, size * 2) if s >= least]

    found = [
        replace(first, block_m=m, block_n=n, block_k=k, num_warps=warps, num_stages=stages)
        for m, n, k, warps, stages in itertools.product(
            sizes(first.block_m, 16), sizes(first.block_n, 32), sizes(first.block_k, 16), (4, 8), (2, 3, 4)
        )
        if m * n <= MAX_ACCUMULATORS * 32 * warps
    ]
    return [t for t in found if t != first]


def candidates(first: Tiles, op: Op, arch: str) -> list[Tiles]:
    """The table's choice, its variants, and tiles near it."""
    return [first, *variants(first, op, arch).values(), *near(first)]


def using(table: dict[str, Tiles]) -> AbstractContextManager[None]:
    """Inside, the tiles of a table where it has the key, else those that would be chosen anyway."""
    return chosen_by(lambda *asked: table.get(tile_key(*asked)) or choose_tiles(*asked))


def asked(step, problem) -> dict[str, tuple[str, Op, Tiles]]:
    """What the step asks for: key -> architecture, operation and the choice."""
    found: dict[str, tuple[str, Op, Tiles]] = {}

    def choose(arch, dtype, op, rows, features):
        chosen = choose_tiles(arch, dtype, op, rows, features)
        found[tile_key(arch, dtype, op, rows, features)] = arch, op, chosen
        return chosen

    with chosen_by(choose):
        step.run(problem)
    return found


def exact_results(problem: layer.Problem) -> list[torch.Tensor]:
    """What the reference makes of a problem in float32: output and gradients."""
    exact = problem.to(torch.float32)
    return peers.ours(exact, exact.chosen, "reference").run(exact)


# Too large for the GPU; what Triton's compiler refuses, or breaks off at.
NOT_HERE = ("OutOfResources", "CompilationError", "PassManager")


def error_of(step, problem: layer.Problem, expected: list[torch.Tensor]) -> float | None:
    """Largest error of a step's results, over the largest value; None where its tiles do not fit the GPU or compile."""
    try:
        found = step.run(problem)
    except Exception as error:  # whatever the compiler or the driver says of a tile
        if not any(name in f"{type(error).__name__}: {error}" for name in NOT_HERE):
            raise
        return None
    return layer.largest_error(found, expected)


def run(
    shape: LayerShape, tokens: int, dtype: torch.dtype, device: torch.device, rounds: int, out: str | Path
) -> list[dict]:
    """A row for every tuned kernel: its tiles, and the step's time with the table's choice and with the fastest.

    Raises RuntimeError when the step with the winners is wrong; the file is then not written.
    """
    problem = layer.make_problem(shape, tokens, dtype, device)
    step = peers.ours(problem, problem.chosen, "triton")
    expected, best, rows = exact_results(problem), {}, []

    def seconds(table: dict[str, Tiles]) -> float:
        with using(table):
            times = layer.interleaved({"step": lambda: step.run(problem)}, rounds, device)["step"]
        return statistics.median(times)

    for key, (arch, op, first) in asked(step, problem).items():
        before, fastest, wrong = seconds(best), first, []
        limit = before
        for ways in (True, False):  # the best way to load and to walk, and its sizes then
            for candidate in variants(fastest, op, arch).values() if ways else near(fastest):
                table = best | {key: candidate}
                with using(table):
                    error = error_of(step, problem, expected)
                if error is None:
                    continue
                if not error <= layer.TOLERANCE[dtype]:
                    wrong.append(str(candidate))
                    continue
                time = seconds(table)
                if time < limit:
                    fastest, limit = candidate, time
        if fastest != first:
            best[key] = fastest
        times = {"before ms": before * 1e3, "after ms": limit * 1e3}
        rows.append({"kernel": key, "tiles": str(fastest), **times, "wrong": wrong})
    with using(best):
        layer.check(problem, dtype, "triton")
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    kept = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    temporary = out.with_suffix(".tmp")
    temporary.write_text(json.dumps(kept | {key: asdict(t) for key, t in best.items()}, indent=1), encoding="utf-8")
    os.replace(temporary, out)
    return rows

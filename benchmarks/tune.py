"""Find the fastest tiles of a layer on the GPU at hand, and keep them in a file.

One kernel at a time: each candidate takes its place in the whole step, whose results are held to the reference before
it is timed. That is done by several processes, because compiling takes longest; timed is alone. A candidate that does
not fit the GPU is passed over, and so is a wrong one, which the table names; the winners together must agree with the
reference before the file is written.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, astuple, dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch

from benchmarks import layer, peers
from benchmarks.shapes import LayerShape
from esft_kernels.triton_ops.tiles import Op, Tiles, choose_tiles, chosen_by, tile_key, variants

MAX_ACCUMULATORS = 128  # fp32 registers of a thread's 255 that a tile may take for its sums


def near(first: Tiles) -> list[Tiles]:
    """Tiles that differ in one or two of their sizes: halved or doubled, within what registers hold."""

    def sizes(size: int, least: int) -> list[int]:
        return [s for s in (size // 2, size, size * 2) if s >= least]

    found = [
        replace(first, block_m=m, block_n=n, block_k=k, num_warps=warps, num_stages=stages)
        for m, n, k, warps, stages in itertools.product(
            sizes(first.block_m, 16), sizes(first.block_n, 32), sizes(first.block_k, 16), (4, 8), (2, 3, 4)
        )
        if m * n <= MAX_ACCUMULATORS * 32 * warps
    ]
    return [t for t in found if 0 < sum(a != b for a, b in zip(astuple(t), astuple(first), strict=True)) <= 2]


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


@dataclass(frozen=True)
class Given:
    """A layer and a batch whose kernels are tuned; what every process makes for itself."""

    shape: LayerShape
    tokens: int
    dtype: torch.dtype
    device: torch.device

    def problem(self) -> layer.Problem:
        return layer.make_problem(self.shape, self.tokens, self.dtype, self.device)


@contextmanager
def checker(given: Given, workers: int) -> Iterator[Callable[[list[dict[str, Tiles]]], Iterator[float | None]]]:
    """Inside, a function from tables of tiles to each one's ``error_of``, several at a time.

    With one worker it is this process, else as many others, which compile into the cache that this one finds.
    """
    expected = [tensor.cpu() for tensor in exact_results(given.problem())]  # which take most of the memory
    if workers == 1:
        _prepare(given, expected)
        yield lambda tables: map(_error, tables)
        return
    with ProcessPoolExecutor(workers, get_context("spawn"), _prepare, (given, expected)) as pool:
        yield lambda tables: pool.map(_error, tables)


_prepared: list[tuple] = []  # of a worker: step, problem, and the results that there should be


def _prepare(given: Given, expected: list[torch.Tensor]) -> None:
    problem = given.problem()
    step = peers.ours(problem, problem.chosen, "triton")
    _prepared[:] = [(step, problem, [tensor.to(given.device) for tensor in expected])]


def _error(table: dict[str, Tiles]) -> float | None:
    with using(table):
        return error_of(*_prepared[0])


def run(
    shape: LayerShape, tokens: int, dtype: torch.dtype, device: torch.device, rounds: int, out: str | Path,
    workers: int = 1,
) -> list[dict]:  # fmt: skip
    """A row for every tuned kernel: its tiles, and what the step then takes of what it took with the table's choice.

    A candidate is timed beside what is best so far, in turns, because a GPU's clock wanders by more than a kernel
    gains; it is taken where three of four rounds speak for it. The last row is the whole step, all kernels in the
    table's choice and all in the fastest. Raises RuntimeError when the step with the winners is wrong; the file is then
    not written.
    """
    given = Given(shape, tokens, dtype, device)
    problem = given.problem()
    step = peers.ours(problem, problem.chosen, "triton")
    found = asked(step, problem)
    first = {key: chosen for key, (_, _, chosen) in found.items()}
    best = dict(first)
    rows = {
        key: {"kernel": key, "tiles": str(tiles), "step": 1.0, "wrong": list[str]()} for key, tiles in first.items()
    }

    def side_by_side(before: dict[str, Tiles], after: dict[str, Tiles], rounds: int) -> list[list[float]]:
        tables = {"before": before, "after": after}
        tasks = {name: partial(_run_with, table, step, problem) for name, table in tables.items()}
        return list(layer.interleaved(tasks, rounds, device).values())

    with checker(given, workers) as errors:
        for ways in (True, False):  # the best way to load and to walk, and its sizes then
            tried = [
                (key, candidate)
                for key, (arch, op, _) in found.items()
                for candidate in (variants(best[key], op, arch).values() if ways else near(best[key]))
            ]
            checked = list(errors([{key: candidate} for key, candidate in tried]))  # all, before anything is timed
            for (key, candidate), error in zip(tried, checked, strict=True):
                if error is None:
                    continue
                if not error <= layer.TOLERANCE[dtype]:
                    rows[key]["wrong"].append(str(candidate))
                    continue
                before, after = side_by_side(best, best | {key: candidate}, rounds)
                _, middle, high = statistics.quantiles([b / a for a, b in zip(before, after, strict=True)], n=4)
                if high < 1:
                    best[key] = candidate
                    rows[key] |= {"tiles": str(candidate), "step": rows[key]["step"] * middle}
    with using(best):
        layer.check(problem, dtype, "triton")
    before, after = (statistics.median(times) for times in side_by_side(first, best, 3 * rounds))
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    kept = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    faster = {key: asdict(tiles) for key, tiles in best.items() if tiles != first[key]}
    temporary = out.with_suffix(".tmp")
    temporary.write_text(json.dumps(kept | faster, indent=1), encoding="utf-8")
    os.replace(temporary, out)
    whole = f"{before * 1e3:.3f} ms before, {after * 1e3:.3f} ms after"
    return [*rows.values(), {"kernel": "all", "tiles": whole, "step": after / before, "wrong": []}]


def _run_with(table: dict[str, Tiles], step: peers.PoolStep, problem: layer.Problem) -> None:
    with using(table):
        step.run(problem)

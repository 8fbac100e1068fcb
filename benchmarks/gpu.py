"""One GPU, whole: every op in every tile checked, layers timed beside others, and a page with all of it.

Part by part, each kept as soon as it is there, so that a run that broke off or ran out of time goes on where it was.
Times are medians over rounds, see ``layer.interleaved``. Nothing is timed before it was checked.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType

import torch

import esft_kernels
from benchmarks import launches, layer, peers, tune
from benchmarks.roofline import GPUS, Launch, even_rows, ours
from benchmarks.shapes import LayerShape
from esft.errors import InputError
from esft.runs.report import table
from esft_kernels.triton_ops.tiles import variants, varied

CHECKED_TOKENS = 512  # of the batch that every tile is checked on
RESULTS, PAGE = "results.json", "report.md"

Rows = list[dict]


def check_tiles(shape: LayerShape, dtype: torch.dtype, device: torch.device, most: int, workers: int) -> Rows:
    """A row for every op: how many tiles near the chosen ones were right, did not fit the GPU, or were wrong.

    Each takes its place in a whole step, whose results are held to the reference in float32. ``most``: tiles of an op;
    ``workers``: processes that check them.
    """
    given = tune.Given(shape, CHECKED_TOKENS, dtype, device)
    problem = given.problem()
    asked = tune.asked(peers.ours(problem, problem.chosen, "triton"), problem)
    tried = [
        (key, tiles) for key, (arch, op, first) in asked.items() for tiles in tune.candidates(first, op, arch)[:most]
    ]
    rows = {key: {"kernel": key, "right": 0, "does not fit": 0, "wrong": [], "largest error": 0.0} for key in asked}
    with tune.checker(given, workers) as errors:
        for (key, tiles), error in zip(tried, errors([{key: tiles} for key, tiles in tried]), strict=True):
            row = rows[key]
            if error is None:
                row["does not fit"] += 1
                continue
            if math.isfinite(error):  # else it is among the wrong ones
                row["largest error"] = max(row["largest error"], error)
            if error <= layer.TOLERANCE[dtype]:
                row["right"] += 1
            else:
                row["wrong"].append(str(tiles))
    return list(rows.values())


def time_variants(shape: LayerShape, tokens: int, dtype: torch.dtype, device: torch.device, rounds: int) -> Rows:
    """A row for every variant of the chosen tiles: the time of a step in which every op that has it takes it."""
    problem = layer.make_problem(shape, tokens, dtype, device)
    step, expected = peers.ours(problem, problem.chosen, "triton"), tune.exact_results(problem)
    asked = tune.asked(step, problem).values()
    names = ["chosen", *{name: 0 for arch, op, first in asked for name in variants(first, op, arch)}]
    errors = {}
    for name in names:
        with varied(name):
            errors[name] = tune.error_of(step, problem, expected)

    def run(name: str) -> None:
        with varied(name):
            step.run(problem)

    right = [name for name, error in errors.items() if error is not None and error <= layer.TOLERANCE[dtype]]
    times = layer.interleaved({name: partial(run, name) for name in right}, rounds, device)
    return [
        {
            "tiles": name,
            "largest error": error,
            "step ms": statistics.median(times[name]) * 1e3 if name in right else None,
            "is": "right" if name in right else "does not fit" if error is None else "wrong",
        }
        for name, error in errors.items()
    ]


def time_layer(
    shape: LayerShape, tokens: int, dtype: torch.dtype, device: torch.device, rounds: int, name: str
) -> Rows:
    """``layer.run``, with the share of the GPU's peak and of the computed roofline where these are known."""
    rows = layer.run(shape, tokens, dtype, device, "triton", rounds)
    known = next((gpu for key, gpu in GPUS.items() if key in name), None)
    if known is None:
        return rows
    trained = layer.chosen_experts(shape)
    launch = Launch(shape, known.arch, tokens, even_rows(shape, tokens, trained, layer.SHARE))
    flops = shape.flops(tokens, sum(launch.rows_E[:trained]))
    least = sum(each.seconds(known) for each in ours(launch, trained))
    for row in rows:
        seconds = row["esft ms"] / 1e3
        row |= {"of peak": f"{flops / seconds / known.flops:.0%}", "of roofline": f"{least / seconds:.0%}"}
    return rows


def parts(
    shapes: list[LayerShape], tokens: list[int], dtype: torch.dtype, device: torch.device, rounds: int, most: int,
    name: str, workers: int,
) -> dict[str, Callable[[], Rows]]:  # fmt: skip
    """What there is to do, by name, in its order: all that is checked before all that is timed."""
    made: dict[str, Callable[[], Rows]] = {}
    for shape in shapes:
        made[f"Launches of {shape.name}"] = lambda shape=shape: launches.rows(shape)
        made[f"Tiles of {shape.name}"] = lambda shape=shape: check_tiles(shape, dtype, device, most, workers)
    for shape in shapes:
        for count in tokens:
            made[f"Variants of {shape.name}, {count:,} tokens"] = partial(
                time_variants, shape, count, dtype, device, rounds
            )
            made[f"{shape.name}, {count:,} tokens"] = lambda shape=shape, count=count: time_layer(
                shape, count, dtype, device, rounds, name
            )
    return made


def run(todo: dict[str, Callable[[], Rows]], about: dict[str, str], folder: Path, minutes: float) -> dict[str, Rows]:
    """Do what is not done yet, until it is done or the minutes are over; returns all that there is.

    ``folder`` gets the results and the page. A part that fails is kept with its error, and done again the next time.
    Raises InputError for results of another machine, of other versions or kernels, or in another dtype.
    """
    folder.mkdir(parents=True, exist_ok=True)
    results, began = folder / RESULTS, time.monotonic()
    kept = json.loads(results.read_text(encoding="utf-8")) if results.exists() else {"about": about, "parts": {}}
    if kept["about"] != about:
        raise InputError(f"{results}: is of {kept['about']}, and this is {about}; name another --out")
    done: dict[str, Rows] = kept["parts"]
    for name, part in todo.items():
        if name in done and "error" not in done[name][0]:
            continue
        if time.monotonic() - began > 60 * minutes:
            break
        started = time.monotonic()
        try:
            done[name] = part()
        except Exception as error:  # one that fails is a result too, and the others go on
            done[name] = [{"error": f"{type(error).__name__}: {error}"}]
        print(f"{name}: {time.monotonic() - started:.1f} s", file=sys.stderr, flush=True)
        temporary = results.with_suffix(".tmp")
        temporary.write_text(json.dumps({"about": about, "parts": done}, indent=1), encoding="utf-8")
        os.replace(temporary, results)
        (folder / PAGE).write_text(page(about, done, list(todo)), encoding="utf-8")
    return done


def page(about: dict[str, str], done: dict[str, Rows], names: list[str]) -> str:
    """All of it in Markdown; what is not done yet is named."""
    text = ["# Measured on " + about["device"], "", *(f"- {key}: {value}" for key, value in about.items())]
    for name in names:
        text += ["", f"## {name}", "", table(done[name]) if name in done else "Not done yet: run it again."]
    return "\n".join(text) + "\n"


def about(device: torch.device, dtype: torch.dtype, *packages: ModuleType) -> dict[str, str]:
    """What results are of: those of two machines, or of code that was changed in between, are never mixed.

    ``packages`` are those beside the kernels that were measured.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU, Triton's interpreter"
    versions = {package: importlib.metadata.version(package) for package in ("torch", "triton", "transformers")}
    kept = {package.__name__.replace("esft_", ""): _code(package) for package in (esft_kernels, *packages)}
    return {"device": name, "dtype": str(dtype).removeprefix("torch."), **kept, **versions}


def _code(package: ModuleType) -> str:
    sources = sorted(Path(str(package.__file__)).parent.rglob("*.py"))
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:12]

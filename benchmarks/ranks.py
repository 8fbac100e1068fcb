"""Training steps by several processes: how much faster, and what they send one another.

Every process has one core and, by ``torchrun``, its share of the same batches. The bytes are counted from the
collective operations of real steps; those of jobs too large for one machine are computed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

import esft
from benchmarks.step import SUPERVISED, chosen_experts
from benchmarks.traffic import Traffic
from esft.data.examples import IGNORE, Example
from esft.parallel.join import joined
from esft.planning.gpus import spreads
from esft.planning.outline import outline
from esft.runs.config import TrainConfig
from esft.short_attention import use_short_attention
from esft.training.methods import METHODS, Source
from esft.training.steps import Steps

RATE = 1e-6  # small enough that a model timed for long stays what it was
METHODS_TIMED = ("esft", "esft --shard experts", "full")


def run(model: str, records: int, length: int, steps: int, sizes: list[int]) -> list[dict[str, Any]]:
    """A row for every method and number of processes; times beside one process's."""
    rows: list[dict[str, Any]] = []
    for method in METHODS_TIMED:
        alone = None
        for size in sizes:
            found = _measured(model, records, length, steps, method, size)
            alone = found["seconds"] if size == 1 else alone
            row = {"method": method, "processes": size, "tokens/s": round(records * length / found["seconds"])}
            row["times one process"] = round(alone / found["seconds"], 2) if alone else None
            rows.append(row | found["sent"])
    return rows


def _measured(model: str, records: int, length: int, steps: int, method: str, size: int) -> dict[str, Any]:
    given = [model, str(records), str(length), str(steps), method]
    job = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}", "-m", "benchmarks.ranks", *given]
    kept = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}
    ended = subprocess.run(
        [sys.executable, *job], env=os.environ | kept, cwd=Path(__file__).parents[1], capture_output=True, text=True
    )
    if ended.returncode:
        raise RuntimeError(f"{method} by {size} processes: {ended.stderr[-2000:]}")
    return json.loads(ended.stdout.splitlines()[-1])


def work(model: str, records: int, length: int, steps: int, method: str) -> dict[str, Any]:
    """One rank's part: the median seconds of a step, and what a step sends."""
    torch.set_num_threads(1)
    with joined() as ranks:
        _keep_to_a_core(ranks.rank)
        method, _, shard = method.partition(" --shard ")
        selection = chosen_experts(model) if method == "esft" else None
        config = TrainConfig(method=method, lr=RATE, batch_size=records, steps=steps + 3, shard=shard or "none")
        trained, _ = METHODS[method].prepare(Source(model), config, selection)
        use_short_attention(trained)
        loop = Steps(trained.train(), 0, config, ranks=ranks)
        batch = _batch(records, length, trained.config.get_text_config().vocab_size)
        times = []
        for step in range(1, steps + 3):
            begun = time.perf_counter()
            loop.update(step, batch)
            times.append(time.perf_counter() - begun)
        with Traffic() as traffic:
            loop.update(steps + 3, batch)
        gradients = sum(p.nbytes for p in loop.optimizer.params.values())
        sent = {
            "gradients, MB": round(gradients / 1e6, 3),
            "sent, MB": round(sum(traffic.payload.values()) / 1e6, 3),
            "of which small, bytes": traffic.small,
            "operations": sum(traffic.calls.values()),
        }
    return {"seconds": statistics.median(times[2:]), "sent": sent}


def _keep_to_a_core(rank: int) -> None:
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[rank % len(cores)]})


def _batch(records: int, length: int, vocabulary: int) -> list[Example]:
    """Random ids, the last ``SUPERVISED`` of each with labels, as an answer has."""
    ids = torch.randint(5, vocabulary, (records, length), generator=torch.Generator().manual_seed(0)).tolist()
    unlearnt = round(length * (1 - SUPERVISED))
    return [Example(row, [IGNORE] * unlearnt + row[unlearnt:]) for row in ids]


def computed(models: list[Path], gpus: list[int], experts: int | None = None) -> list[dict[str, Any]]:
    """Bytes that each GPU sends a step, in GB; computed: every collective in a ring, bf16, 2,048 tokens on each GPU.

    Of ESFT see ``esft.planning.gpus``. Full fine-tuning with everything cut up gathers all of it for the forward and
    again for the backward, and scatters its gradients.
    """
    rows = []
    for model in models:
        plans = {
            method: esft.plan(str(model), config=TrainConfig(method=method, batch_size=1, dtype="bfloat16"), **more)
            for method, more in (("esft", {"experts": experts}), ("full", {}))
        }
        ours, full = plans["esft"], plans["full"]
        for count in gpus:
            ring = (count - 1) / count
            row = {"model": model.name, "GPUs": count}
            nothing, frozen, dealt, _ = (
                float(way.sent) for way in spreads(ours, count, outline(str(model), "bfloat16"))
            )
            row |= {"ESFT": nothing, "ESFT, frozen sharded": frozen, "ESFT, experts dealt out": dealt}
            row["full"] = 2 * ring * full.gradients
            row["full, FSDP"] = 3 * ring * full.gradients
            rows.append({k: f"{v / 1e9:.2f}" if isinstance(v, float) else v for k, v in row.items()})
    return rows


def _main() -> None:
    parser = argparse.ArgumentParser(description="one rank of a measured job")
    parser.add_argument("model")
    for name in ("records", "length", "steps"):
        parser.add_argument(name, type=int)
    parser.add_argument("method")
    found = work(**vars(parser.parse_args()))
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(found))


if __name__ == "__main__":
    _main()

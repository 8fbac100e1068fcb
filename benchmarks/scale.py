"""A big model's stages at its true size, each in a process of its own: seconds, tokens a second, memory, disk.

The weights are random, so what is measured is what sizes cost, not what is learned.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

from benchmarks.dense import dense_rate, flops_per_token
from benchmarks.measured_process import python, run
from benchmarks.random_checkpoint import MODELS, write_checkpoint
from esft.checkpoint.load import load_skeleton, load_tokenizer
from esft.experts.moe_layers import moe_layers
from esft.selection import ExpertSelection

STEPS, TOKENS, RECORDS = 4, 2048, 4  # of training: steps, tokens of one, records of one
STAGES = ("score", "select", "train", "merge")
PEERS = ("stock full", "stock lora")  # what a user would take instead


def measure(
    name: str,
    settings: dict[str, str],
    experts: Path | None,
    folder: Path,
    memory_gb: float | None,
    stages: set[str],
) -> list[dict]:
    """A row for each stage; what a stage needs of those before it must be there.

    Args:
        name: of a folder in ``MODELS``.
        settings: of the training, as its options are called; those that begin with ``frozen`` are scoring's as well.
        experts: selection file; None for what scoring chooses.
        folder: of everything that is written.
        memory_gb: what every stage is held to.
        stages: some of ``STAGES`` and ``PEERS``.
    """
    base = write_checkpoint(name, folder / name)
    data, scores, chosen = folder / "data.jsonl", folder / f"{name}.scores.json", folder / f"{name}.experts.json"
    adapter, merged = folder / f"{name}.run", folder / f"{name}.merged"
    _write_records(data, base)
    common = ["--model", str(base), "--quiet"]
    options = {key: ["--" + key.replace("_", "-"), value] for key, value in settings.items()}
    frozen = [each for key, option in options.items() if key.startswith("frozen") for each in option]
    commands = {
        "score": ["score", *common, "--data", data, "--out", scores, "--overwrite", "--max-tokens", 2 * TOKENS,
                  "--max-length", TOKENS, *frozen],
        "select": ["select", "--scores", scores, "--out", chosen, "--overwrite"],
        "train": ["train", *common, "--data", data, "--out", adapter, "--overwrite", "--experts", experts or chosen,
                  "--steps", STEPS, "--batch-size", RECORDS, "--max-length", TOKENS // RECORDS,
                  *(each for option in options.values() for each in option)],
        "merge": ["merge", "--model", base, "--adapter", adapter, "--out", merged, "--overwrite"],
    }  # fmt: skip
    rows = []
    for stage in [stage for stage in (*PEERS, *STAGES) if stage in stages]:
        if stage in PEERS:
            rows.append({"stage": stage, **_peer(stage, base, data, memory_gb)})
            continue
        found = run(python("-m", "esft", *map(str, commands[stage])), memory_gb)
        rows.append({"stage": stage, **found})
        if found["status"]:
            break
        if stage == "train":
            rows[-1] |= _of_training(adapter, base, experts or chosen)
        if stage == "merge":
            rows[-1]["disk_gb"] = _size(merged)
            shutil.rmtree(merged)
    return rows


def _peer(stage: str, base: Path, data: Path, memory_gb: float | None) -> dict:
    """What a training without this project takes; one that dies ends no other stage."""
    method = stage.removeprefix("stock ")
    sizes = ["--steps", STEPS, "--records", RECORDS, "--length", TOKENS // RECORDS]
    command = ["-m", "benchmarks.stock_training", "--model", base, "--data", data, "--method", method, *sizes]
    found = run(python(*map(str, command)), memory_gb)
    return found if found["status"] else found | {"tokens_per_second": float(found.pop("said"))}


def shown(rows: list[dict]) -> list[dict]:
    """The rows for a table: three digits, and nothing where a stage has no such figure."""
    names = dict.fromkeys(name for row in rows for name in row)
    return [{n: f"{v:.3g}" if isinstance(v := row.get(n, ""), float) else v for n in names} for row in rows]


def first_experts(model: str, count: int, path: Path) -> Path:
    """A selection of so many experts in each MoE layer: random weights make no choice that says anything."""
    layers = moe_layers(load_skeleton(str(MODELS / model)))
    ExpertSelection({layer.index: list(range(count)) for layer in layers}).save(path)
    return path


def _of_training(run_folder: Path, base: Path, experts: Path) -> dict:
    """Tokens a second after the first step, the share of what FLOPs and dense products allow, and bytes stored."""
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    speeds = sorted(line["tokens_per_second"] for line in lines if "tokens_per_second" in line and line["step"] > 1)
    speed = speeds[len(speeds) // 2]
    flops, rate = flops_per_token(str(base), ExpertSelection.load(experts)), dense_rate()
    return {
        "tokens_per_second": speed,
        "dense_tflops": rate / 1e12,
        "share_of_dense": speed * flops / rate,
        "disk_gb": _size(run_folder / "adapter"),
    }


def _size(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e9


def _write_records(path: Path, base: Path) -> None:
    """Chat records of random words, every one longer than a step's share of tokens."""
    drawn, tokenizer = random.Random(0), load_tokenizer(str(base))
    words = [f"{drawn.choice('bdfgklmnprst')}{drawn.choice('aeiou')}{drawn.choice('lmnrst')}" for _ in range(500)]
    lines = []
    for _ in range(STEPS * RECORDS):
        text = " ".join(drawn.choices(words, k=TOKENS))
        while len(tokenizer(text)["input_ids"]) < 2 * TOKENS // RECORDS:
            text += text
        half = [{"role": "user", "content": text[:40]}, {"role": "assistant", "content": text}]
        lines.append(json.dumps({"messages": half}) + "\n")
    path.write_text("".join(lines), encoding="utf-8")

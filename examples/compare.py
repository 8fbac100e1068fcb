"""ESFT, full fine-tuning and LoRA on the same data: one table.

    python -m examples.compare --data build/home_assistant --general build/general.jsonl --out build/compare

Each method trains in a process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import esft
from esft.adapters.load_any import load_any_adapter
from esft.checkpoint.load import load_model, load_tokenizer
from esft.evaluation.loss import mean_loss
from esft.runs.report import table
from examples.demo import ESFT, MODEL, choose, load, score_task, task_score
from examples.general import encode_general

# The best on the validation data: for ESFT among six settings, for full of 5e-4 and 1e-3; LoRA's is the only one tried.
LEARNING_RATES = {"esft": ESFT.lr, "full": 5e-4, "lora": 4e-3}


def general_loss(model, records: list[dict]) -> dict[str, float]:
    """Loss per token, nats, of every part of the general data."""
    tokenizer = load_tokenizer(str(MODEL))
    parts = encode_general(tokenizer, records)
    return {name: mean_loss(model, examples, tokenizer.pad_token_id) for name, examples in parts.items()}


def read_general(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run_method(method: str, lr: float, args: argparse.Namespace) -> None:
    """Train, measure, and leave the figures in a file."""
    out = args.out / method
    config = dataclasses.replace(ESFT, method=method, lr=lr)
    selection = esft.ExpertSelection.load(args.out / "experts.json") if method == "esft" else None
    result = esft.train(
        str(MODEL), args.data / "train.jsonl", out, config, selection, args.data / "validation.jsonl", overwrite=True
    )
    if method == "full":
        model = load(out / "model")
    elif method == "esft":
        model = esft.load_adapter(load(MODEL), out / "adapter")
    else:
        model = load_any_adapter(load_model(str(MODEL)), out / "adapter")
    score, _ = task_score(model, args.data / args.split)
    figures = vars(result) | {"lr": lr, "score": score, "general": general_loss(model, read_general(args.general))}
    (out / "figures.json").write_text(json.dumps(figures), encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description="ESFT, full fine-tuning and LoRA side by side")
    parser.add_argument("--data", type=Path, required=True, help="folder with train, validation and test.jsonl")
    parser.add_argument("--general", type=Path, required=True, help="from examples.general")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--split", default="test.jsonl", help="the file to score on; validation.jsonl to choose by")
    parser.add_argument("--method", choices=LEARNING_RATES, help="run this one here, and print no table")
    parser.add_argument("--lr", type=float, help="with --method")
    args = parser.parse_args(argv)
    if args.method is None:
        shutil.rmtree(args.out, ignore_errors=True)
    args.out.mkdir(parents=True, exist_ok=True)
    if not (args.out / "experts.json").exists():
        scores = score_task(str(MODEL), args.data / "train.jsonl")
        choose(scores).save(args.out / "experts.json")
    if args.method is not None:
        run_method(args.method, args.lr or LEARNING_RATES[args.method], args)
        return
    for method in LEARNING_RATES:
        subprocess.run([sys.executable, "-m", "examples.compare", *argv, "--method", method], check=True)
    show(args)


def show(args: argparse.Namespace) -> None:
    """The table of what every method left; losses of the general data with their rise above the base's."""
    base = load(MODEL)
    parameters = sum(p.numel() for p in base.parameters())
    before = general_loss(base, read_general(args.general))
    score, _ = task_score(base, args.data / args.split)
    rows = [{"method": "base", "exact match": f"{score:.1%}"} | before]
    rows[0] |= dict.fromkeys(("trained", "share", "stored MB", "peak MB", "seconds"), "")
    for method in LEARNING_RATES:
        figures = json.loads((args.out / method / "figures.json").read_text(encoding="utf-8"))
        rows.append(
            {
                "method": method,
                "exact match": f"{figures['score']:.1%}",
                **{name: f"{loss:.3f} (+{loss - before[name]:.3f})" for name, loss in figures["general"].items()},
                "trained": figures["trained_parameters"],
                "share": f"{figures['trained_parameters'] / parameters:.1%}",
                "stored MB": f"{figures['stored_bytes'] / 1e6:.1f}",
                "peak MB": f"{figures['peak_rss'] / 1e6:.0f}",
                "seconds": f"{figures['seconds']:.0f}",
            }
        )
    print(table(rows))
    print(json.dumps(rows))


if __name__ == "__main__":
    main()

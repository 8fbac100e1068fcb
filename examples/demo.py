"""The whole path on a real small model and a real task, in a few minutes on a CPU.

python -m examples.demo --data build/home_assistant --out build/demo
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

import esft
from esft.checkpoint.load import load_model, load_tokenizer
from esft.data.batches import windows
from esft.data.cache import encoded
from esft.data.encoding import Encoder
from esft.data.sources import DataSource, read_records
from esft.evaluation.scores import exact_match
from esft.scoring.plot import plot_scores

MODEL = Path(__file__).parent / "tiny-moe"
# The best of the six settings tried on the validation data that keep the adapter under 15% of the parameters.
TOP_P, SHARED_EXPERTS = 0.3, True
SETTINGS = {"batch_size": 32, "max_length": 256, "warmup_steps": 20, "decay": 0.5, "eval_every": 100, "save_every": 200}
ESFT = esft.TrainConfig(method="esft", lr=5e-3, steps=500, **SETTINGS)


def headline(text: str) -> None:
    print(f"\n== {text}", flush=True)


def load(checkpoint: str | Path) -> PreTrainedModel:
    """The checkpoint's model on this project's experts; nothing of it trains yet."""
    return esft.swap(load_model(str(checkpoint)), esft.ExpertSelection({}))


def score_task(model: str, data: Path) -> esft.ExpertScores:
    """Expert scores on the task's training data, laid out as in the paper: records end to end in full rows."""
    examples = encoded(DataSource.of(data), Encoder(load_tokenizer(model), 512))
    return esft.score_experts(load(model), windows(examples, 512, 8))


def choose(scores: esft.ExpertScores) -> esft.ExpertSelection:
    """The routed experts that get TOP_P of the task's tokens, and the shared experts beside them."""
    routed = esft.select_experts(scores, by="token", top_p=TOP_P)
    return dataclasses.replace(routed, shared_experts=SHARED_EXPERTS)


def task_score(model: torch.nn.Module, data: Path) -> tuple[float, list[dict]]:
    return exact_match(model, load_tokenizer(str(MODEL)), read_records(data), batch_size=128, progress=True)


def size(folder: Path) -> float:
    """Megabytes of the weights in a folder."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e6


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="ESFT of a small model, start to end")
    parser.add_argument("--data", type=Path, required=True, help="folder with train, validation and test.jsonl")
    parser.add_argument("--out", type=Path, required=True, help="folder for everything written; replaced")
    args = parser.parse_args(argv)
    started, model, test = time.monotonic(), str(MODEL), args.data / "test.jsonl"
    logging.disable_progress_bar()  # of loading: a tenth of a second here
    logging.set_verbosity_error()
    shutil.rmtree(args.out, ignore_errors=True)
    args.out.mkdir(parents=True)

    headline("The base model on the task, before training")
    before, outcomes = task_score(load(model), test)
    print(f"exact match on {len(outcomes)} commands worded by templates that training never shows: {before:.1%}")

    headline("Which experts does the task use?")
    scores = score_task(model, args.data / "train.jsonl")
    scores.save(args.out / "scores.json")
    selection = choose(scores)
    selection.save(args.out / "experts.json")
    for layer, ids in selection.experts.items():
        print(f"layer {layer}: {len(ids)} of {len(scores.token_scores[layer])} experts: {ids}")
    print(f"and the shared experts: {SHARED_EXPERTS}")
    picture = plot_scores(scores, selection, args.out / "experts.png", f"Home Assistant commands, top_p {TOP_P}")
    print(f"picture: {picture}")

    headline("Training these experts only")
    run = args.out / "run"
    result = esft.train(
        model, args.data / "train.jsonl", run, ESFT, selection, eval_data=args.data / "validation.jsonl"
    )
    print(f"{result.trained_parameters:,} parameters trained, {result.tokens_per_second:,.0f} tokens/s")

    headline("The same commands, after")
    tuned = esft.load_adapter(load(model), run / "adapter")
    after, outcomes = task_score(tuned, test)
    print(f"exact match: {before:.1%} -> {after:.1%}")
    print(f"adapter {size(run / 'adapter'):.1f} MB, checkpoint {size(MODEL):.1f} MB")
    for outcome in [*(o for o in outcomes if o["correct"])][:4] + [*(o for o in outcomes if not o["correct"])][:2]:
        mark = "right" if outcome["correct"] else f"wrong, expected {outcome['expected']}"
        print(f"  {outcome['prompt']}\n    {outcome['given']}  ({mark})")

    headline("Merged into a checkpoint that stock transformers loads")
    print(esft.merge(MODEL, run / "adapter", args.out / "merged"))
    print(f"\n{time.monotonic() - started:.0f} s in all")


if __name__ == "__main__":
    main()

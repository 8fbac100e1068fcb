"""One cell of the comparison: a method with a learning rate and a seed on a task, trained and measured."""

from __future__ import annotations

import random
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import esft
from benchmarks.methods.rules import Rule, as_many, chosen, drawn, least, over_all_layers, upper_half
from esft.adapters.load_any import load_any_adapter
from esft.checkpoint.load import load_model, load_tokenizer
from esft.data.sources import read_records
from esft.evaluation.scores import exact_match
from esft.memory import peak_memory, peak_rss
from examples.compare import general_loss, read_general
from examples.demo import ESFT, MODEL, load


@dataclass(frozen=True)
class Method:
    """What is trained: "esft", "full" or "lora", the experts that a rule chooses, and the learning rates to try.

    Every method has three rates to try, so that none is favoured; None for the base, which is not trained.
    """

    train: str | None
    rates: tuple[float, ...] = (5e-3, 1e-2, 2e-2)
    rule: Rule | None = None


METHODS = {
    "base": Method(None, (0.0,)),
    "full": Method("full", (1e-3, 2e-3, 4e-3)),
    "lora": Method("lora", (4e-3, 8e-3, 1.6e-2)),
    "esft-token": Method("esft", rule=chosen()),
    "esft-gate": Method("esft", rule=chosen("gate")),
    "esft-token, shared": Method("esft", rule=chosen(shared_experts=True)),
    "esft-gate, shared": Method("esft", rule=chosen("gate", shared_experts=True)),
    "output, shared": Method("esft", rule=as_many("output")),
    "fisher, shared": Method("esft", rule=as_many("fisher")),
    "fisher_rows, shared": Method("esft", rule=as_many("fisher_rows")),
    "token over all layers, shared": Method("esft", rule=over_all_layers),
    "upper half, as many": Method("esft", rule=upper_half),
    "random, shared": Method("esft", rule=drawn),
    "least used, shared": Method("esft", rule=least),
    "shared only": Method("esft", rule=lambda scores, rng: esft.ExpertSelection({}, shared_experts=True)),
    "esft-token, shared, others": Method(
        "esft", (5e-4, 1e-3, 2e-3), chosen(shared_experts=True, non_expert_modules=True)
    ),
}


@dataclass(frozen=True, order=True)
class Cell:
    """What is measured once: on the validation split to choose the rate, on the test split for the tables."""

    task: str
    method: str
    rate: float
    seed: int
    split: str
    steps: int

    @property
    def name(self) -> str:
        return "-".join(str(value).replace(", ", "+").replace(" ", "_") for value in asdict(self).values())


def measure(cell: Cell, task: Path, general: Path, out: Path) -> dict[str, Any]:
    """Train and measure; the run goes when it is measured.

    Args:
        task: folder of train, validation and test.jsonl, and scores.json.
        general: file of general data.
        out: folder for the run.
    """
    method, model, found = METHODS[cell.method], load(MODEL), {}
    parameters = sum(p.numel() for p in model.parameters())
    if method.train is not None:
        config = replace(
            ESFT, method=method.train, lr=cell.rate, seed=cell.seed, steps=cell.steps, eval_every=cell.steps
        )
        # The same draw for all rates, another for every seed.
        selection = method.rule and method.rule(
            esft.ExpertScores.load(task / "scores.json"), random.Random(f"{cell.task}/{cell.seed}")
        )
        result = esft.train(str(MODEL), task / "train.jsonl", out, config, selection, overwrite=True, progress=False)
        if method.train == "full":
            model = load(out / "model")
        elif method.train == "esft":
            model = esft.load_adapter(model, out / "adapter")
        else:
            model = load_any_adapter(load_model(str(MODEL)), out / "adapter")
        kept = "trained_parameters stored_bytes seconds tokens_per_second".split()
        found = {name: vars(result)[name] for name in kept} | {"peak_memory": peak_memory() or peak_rss()}
        shutil.rmtree(out)
    score, _ = exact_match(
        model, load_tokenizer(str(MODEL)), read_records(task / f"{cell.split}.jsonl"), batch_size=128
    )
    losses = general_loss(model, read_general(general)) if cell.split == "test" else {}
    return asdict(cell) | {"score": score, "general": losses, "parameters": parameters} | found

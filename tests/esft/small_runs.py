"""Short training runs on a tiny model: what the tests of training share."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import esft
from esft.data.examples import IGNORE
from esft.optimizer.adamw import MasterAdamW
from esft.runs.config import TrainConfig
from esft.selection import ExpertSelection
from esft.training.loop import TrainResult
from tests.esft.models import save_tiny, write_records

SELECTION = ExpertSelection({1: [2, 7], 2: [0]})


class FakeLoss:
    """In the place of ``batch_loss``: a mean loss of 10 minus the number of calls, and every gradient zero.

    It keeps the batches that it gets, whether all of the model was in training mode, and a number drawn at every call;
    ``before`` is called first.
    """

    def __init__(self):
        self.batches, self.training, self.drawn = [], [], []
        self.before: Callable[[], Any] = lambda: None

    def __call__(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        self.before()
        self.batches.append(batch["input_ids"].tolist())
        self.training.append(all(module.training for module in model.modules()))
        self.drawn.append(torch.rand(()).item())
        count = int((batch["labels"][:, 1:] != IGNORE).sum())
        trained = next(p for p in model.parameters() if p.requires_grad and p.numel())
        return 0.0 * trained.sum() + (10.0 - len(self.batches)) * count, count


class Recorded(MasterAdamW):
    """Keeps the gradients of every step."""

    kept: dict[str, torch.Tensor] = {}
    count = 0

    def step(self, lr: float) -> float:
        Recorded.count += 1
        for name, p in self.params.items():
            if p.grad is not None:
                Recorded.kept[f"{Recorded.count}/{name}"] = p.grad.clone()
        return super().step(lr)


def breaks(at: int) -> Callable[[], None]:
    """What does nothing when it is called, but for one call, counted from 1: that is as if the user pressed Ctrl+C."""
    calls = itertools.count(1)

    def count() -> None:
        if next(calls) == at:
            raise KeyboardInterrupt

    return count


_SETTINGS = {"lr": 3e-3, "steps": 12, "batch_size": 8, "eval_every": 6, "eval_on_start": False, "save_every": 5}


def settings(**more: Any) -> TrainConfig:
    return TrainConfig(**(_SETTINGS | more))


def base_and_data(folder: Path) -> Path:
    """A checkpoint folder, and beside it ``d.jsonl`` with 24 records."""
    write_records(folder / "d.jsonl")
    return save_tiny(folder / "base")


def run(
    base: Path, out: str, config: TrainConfig, selection: ExpertSelection | None = SELECTION, **more: Any
) -> TrainResult:
    """A run beside the base, evaluated on the data that it trains on."""
    folder = base.parent
    usual = {"eval_data": folder / "d.jsonl", "progress": False}
    return esft.train(str(base), folder / "d.jsonl", folder / out, config, selection, **(usual | more))


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def column(folder: Path, name: str) -> list[float]:
    """One figure of the metrics, of every line that has it."""
    return [line[name] for line in metrics(folder) if name in line]

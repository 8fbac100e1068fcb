"""What is measured of a model while it trains."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import nn

from esft.data.examples import Example
from esft.errors import DivergenceError
from esft.evaluation.loss import mean_loss
from esft.runs.config import TrainConfig


class Evaluations:
    """The loss on evaluation data, every so many steps and after the last.

    Attributes:
        loss: of the last one; None before the first.
    """

    def __init__(self, model: nn.Module, pad: int, config: TrainConfig, examples: Sequence[Example]):
        self.model, self.pad, self.config, self.examples = model, pad, config, examples
        self.loss: float | None = None

    def due(self, step: int) -> bool:
        """Whether one belongs to this step."""
        regular = step % self.config.eval_every == 0 or step == self.config.steps
        return bool(self.examples) and step > 0 and regular

    def recall(self, step: int, lines: Sequence[dict[str, float]]) -> bool:
        """Take what a run's metrics hold of a step. Returns whether they do."""
        known = [line["eval_loss"] for line in lines if line["step"] == step and "eval_loss" in line]
        self.loss = known[-1] if known else self.loss
        return bool(known)

    def measure(self, step: int, log: Callable[..., None]) -> None:
        """Measure and log. Raises DivergenceError for a loss that is no number."""
        loss = mean_loss(self.model, self.examples, self.pad, self.config.micro_batch_size or self.config.batch_size)
        self.model.train()
        if not math.isfinite(loss):
            raise DivergenceError(f"step {step}: loss {loss} on the evaluation data; lower the learning rate")
        log(step, eval_loss=loss)
        self.loss = loss

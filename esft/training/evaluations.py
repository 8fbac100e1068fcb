"""What is measured of a model while it trains, and what follows: which step is best, and whether to go on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from esft.errors import DivergenceError, InputError
from esft.evaluation.scores import EvalSet, measure
from esft.runs.checkpoints import Best
from esft.runs.config import TrainConfig
from esft.runs.metrics import EVALUATED


def figures(config: TrainConfig, sets: Sequence[str]) -> list[str]:
    """What the metrics call the scores of evaluation data with these names: ``eval_NAME_loss``, ``eval_loss``."""
    return [f"{EVALUATED}{name}_{score}" if name else f"{EVALUATED}{score}" for name in sets for score in config.scores]


def deciding(config: TrainConfig, sets: Sequence[str]) -> str | None:
    """Which of ``figures`` tells the best step; None without evaluation data.

    Raises InputError for one that is not measured, and without evaluation data for settings that need some.
    """
    known, wanted = figures(config, sets), config.metric_for_best_model
    if not known:
        needs = config.chooses or ("metric_for_best_model" if wanted is not None else None)
        if needs is not None:
            raise InputError(f"{needs} needs evaluation data (eval_data)")
        return None
    if wanted is None:
        return known[0]
    found = next((name for name in (wanted, EVALUATED + wanted) if name in known), None)
    if found is None:
        raise InputError(f"metric_for_best_model {wanted} is not measured; of {', '.join(known)} it can be one")
    return found


class Evaluations:
    """Evaluations before the first step, every so many steps and after the last.

    Attributes:
        recorded: what was measured, by step and name.
        best: of those so far; None before the first after a step.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        config: TrainConfig,
        sets: Sequence[EvalSet],
        recorded: Mapping[int, dict[str, float]],
        best: Best | None,
    ):
        """Raises InputError as ``deciding`` does.

        Args:
            recorded: of a run that goes on, what its metrics hold.
            best: of a run that goes on.
        """
        self.model, self.tokenizer, self.config, self.sets = model, tokenizer, config, sets
        self.recorded, self.best = dict(recorded), best
        names = [each.name for each in sets]
        self.figures, self.deciding = figures(config, names), deciding(config, names)

    def due(self, step: int) -> bool:
        """Whether one belongs to this step, 0 being before the first."""
        regular = step % self.config.eval_every == 0 or step == self.config.steps
        return bool(self.sets) and (regular if step else self.config.eval_on_start)

    def after(self, step: int, log: Callable[..., None]) -> None:
        """Evaluate, and log it, unless the run has done so before it was stopped.

        Raises DivergenceError where the model gives no numbers, InputError where it does so before any step.
        """
        if not self.recorded.get(step, {}).keys() >= set(self.figures):
            self.recorded[step] = self._measured(step)
            log(step, **self.recorded[step])
        if self.deciding is not None and step > (0 if self.best is None else self.best.seen):
            self.best = self._better(self.best, step, float(self.recorded[step][self.deciding]))

    def _measured(self, step: int) -> dict[str, float]:
        config, values = self.config, []
        for each in self.sets:
            where = f"the evaluation data{' ' * bool(each.name)}{each.name}"
            try:
                together = config.micro_batch_size or config.batch_size
                with torch.compiler.set_stance("force_eager"):  # answers grow, and would be compiled again and again
                    found = measure(self.model, self.tokenizer, each, config.scores, together).scores
            except InputError as error:  # all else was tried out before
                raise _broken(step, f"{error}, on {where}") from error
            if not all(map(math.isfinite, found.values())):
                raise _broken(step, f"loss {found['loss']} on {where}")
            values += found.values()
        self.model.train()
        return dict(zip(self.figures, values, strict=True))

    def _better(self, best: Best | None, step: int, value: float) -> Best:
        if best is None:
            return Best(step, value, 0, step)
        greater = self.config.greater_is_better
        if greater is None:
            greater = not str(self.deciding).endswith("loss")
        gain = value - best.value if greater else best.value - value
        stale = 0 if gain > self.config.early_stopping_threshold else best.stale + 1
        return Best(step, value, stale, step) if gain > 0 else Best(best.step, best.value, stale, step)

    @property
    def exhausted(self) -> bool:
        """Whether as many have been no better as the run has patience for."""
        patience = self.config.early_stopping_patience
        return patience is not None and self.best is not None and self.best.stale >= patience

    def keeps(self, step: int) -> bool:
        """Whether the model after this step is one to come back to."""
        return self.config.load_best_model_at_end and self.best is not None and self.best.step == step


def _broken(step: int, said: str) -> Exception:
    if step:
        return DivergenceError(f"step {step}: {said}; lower the learning rate")
    return InputError(f"before the first step: {said}: the base's weights hold what is no number, or too much")

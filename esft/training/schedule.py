"""The learning-rate schedule."""

from __future__ import annotations

from esft.runs.config import TrainConfig


def learning_rate(config: TrainConfig, step: int) -> float:
    """Of a step, counted from 0: a linear rise over ``warmup_steps``, and a linear fall over the share ``decay``."""
    warm = min(1.0, (step + 1) / (config.warmup_steps + 1))
    fall = config.steps * config.decay
    return config.learning_rate * warm * (min(1.0, (config.steps - step) / fall) if fall else 1.0)

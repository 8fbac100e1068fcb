"""The learning-rate schedule."""

from __future__ import annotations

import math

from esft.runs.config import TrainConfig


def warmup(config: TrainConfig) -> int:
    """Steps over which the learning rate rises; ``warmup_ratio`` rounds up, as in transformers."""
    return config.warmup_steps or math.ceil(config.steps * config.warmup_ratio)


def learning_rate(config: TrainConfig, step: int) -> float:
    """Of a step, counted from 0: a linear rise, and then what ``lr_scheduler_type`` says.

    A rise of n steps has its first step at 1 / (n + 1), and the whole rate after n. A fall begins there, and would be
    at zero after the last step; that of a constant rate takes the share ``decay`` of the steps.
    """
    rise = warmup(config)
    warm, left = min(1.0, (step + 1) / (rise + 1)), config.steps - step
    share = left / (config.steps - rise) if step >= rise else 1.0
    if config.lr_scheduler_type == "linear":
        after = share
    elif config.lr_scheduler_type == "cosine":
        after = (1 - math.cos(math.pi * share)) / 2
    else:
        fall = config.steps * config.decay
        after = min(1.0, left / fall) if fall else 1.0
    return config.learning_rate * warm * after

import math

import pytest
import torch
from transformers import get_scheduler

from esft.optimizer.schedule import learning_rate
from esft.runs.config import TrainConfig


@pytest.mark.parametrize(
    ("settings", "rates"),
    [
        ({"warmup_steps": 1, "decay": 0.5}, [0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2]),
        ({"warmup_steps": 3}, [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1]),
        ({"decay": 1.0}, [1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]),
        ({"warmup_steps": 9, "decay": 1.0}, [(i + 1) * (10 - i) / 100 for i in range(10)]),
        ({}, [1] * 10),
        ({"warmup_ratio": 0.25}, [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1]),  # rounded up
        ({"lr_scheduler_type": "linear"}, [1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]),
        (
            {"lr_scheduler_type": "linear", "warmup_steps": 2},
            [1 / 3, 2 / 3, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125],
        ),
        (
            {"lr_scheduler_type": "cosine", "warmup_ratio": 0.2},
            [1 / 3, 2 / 3, *((1 + math.cos(math.pi * i / 8)) / 2 for i in range(8))],
        ),
        ({"lr_scheduler_type": "cosine", "warmup_steps": 10}, [(i + 1) / 11 for i in range(10)]),
    ],
    ids=str,
)
def test_the_rate_warms_up_holds_and_falls(settings: dict, rates: list[float]):
    config = TrainConfig(lr=3.0, steps=10, **settings)
    assert [learning_rate(config, step) / 3 for step in range(10)] == pytest.approx(rates, rel=1e-12)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_after_the_rise_the_fall_is_that_of_transformers(kind: str):
    config = TrainConfig(lr=3.0, steps=12, warmup_steps=4, lr_scheduler_type=kind)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=3.0)
    theirs = get_scheduler(kind, optimizer, num_warmup_steps=4, num_training_steps=12)
    rates = []
    for _ in range(12):
        rates += theirs.get_last_lr()
        optimizer.step()
        theirs.step()
    assert [learning_rate(config, step) for step in range(4, 12)] == pytest.approx(rates[4:])

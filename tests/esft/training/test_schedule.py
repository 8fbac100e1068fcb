import pytest

from esft.runs.config import TrainConfig
from esft.training.schedule import learning_rate


@pytest.mark.parametrize(
    ("settings", "rates"),
    [
        ({"warmup_steps": 1, "decay": 0.5}, [0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2]),
        ({"warmup_steps": 3}, [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1]),
        ({"decay": 1.0}, [1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]),
        ({"warmup_steps": 9, "decay": 1.0}, [(i + 1) * (10 - i) / 100 for i in range(10)]),
        ({}, [1] * 10),
    ],
    ids=str,
)
def test_the_rate_warms_up_holds_and_falls(settings: dict, rates: list[float]):
    config = TrainConfig(lr=3.0, steps=10, **settings)
    assert [learning_rate(config, step) / 3 for step in range(10)] == pytest.approx(rates, rel=1e-12)

import itertools
import logging
from types import SimpleNamespace

import pytest

from esft.runs import progress
from esft.runs.progress import Bar


@pytest.mark.parametrize("shown", [True, False])
def test_the_bar_counts_the_steps_that_are_done_and_tells_loss_speed_memory_and_supervised_share(
    capsys, monkeypatch, shown: bool
):
    monkeypatch.setattr(progress, "peak_memory", lambda: 3 << 29)
    with Bar("esft", 4, 2, shown) as bar:
        bar.step(1.5, 1.0, 0.0)
        bar.step(1.25, 1234.4, 0.256)
    lines = [line for line in capsys.readouterr().err.replace("\r", "\n").split("\n") if line.strip()]
    assert bool(lines) == shown
    if shown:
        assert "2/4" in lines[0] and "4/4" in lines[-1] and "step" in lines[-1]
        assert not any("2/4" in line and "loss" in line for line in lines)  # which is of the next step
        assert "loss=1.250, tok/s=1,234, mem=1.5GiB, supervised=26%" in lines[-1]


def test_without_a_gpu_the_memory_is_that_of_the_process(capsys, monkeypatch):
    monkeypatch.setattr(progress, "peak_rss", lambda: 1 << 31)
    with Bar("esft", 1, 0, True) as bar:
        bar.step(1.5, 1.0, 0.0)
    assert "mem=2.0GiB" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("steps", "told"),
    [
        (500, ["about 16 min to go: 493 steps of 2 s; 1.5 GiB at most so far"]),
        (5007, ["about 2 h 47 min to go: 5000 steps of 2 s; 1.5 GiB at most so far"]),
        (37, ["about 1 min to go: 30 steps of 2 s; 1.5 GiB at most so far"]),
        (36, []),  # less than a minute
        (6, []),
    ],
)
def test_after_the_first_steps_the_time_that_is_left_is_told_once(caplog, monkeypatch, steps: int, told: list):
    """The first two steps do not count: they take as long as they like."""
    monkeypatch.setattr(progress, "peak_memory", lambda: 3 << 29)
    clock = itertools.chain([1000.0], itertools.count(1010.0, 10.0))
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    with caplog.at_level(logging.INFO, "esft"), Bar("esft", steps + 3, 3, False) as bar:
        for number in range(min(steps, 20)):
            assert bool(caplog.records) == (bool(told) and number >= 2 + 5)
            bar.step(1.0, 1.0, 0.5)
    assert [record.getMessage() for record in caplog.records] == told

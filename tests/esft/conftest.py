"""Runs on a tiny base: the fixtures that the tests of runs and of training share."""

import shutil

import pytest

from esft.evaluation import scores
from esft.optimizer.adamw import MasterAdamW
from esft.training import steps as step_module
from tests.esft.small_runs import FakeLoss, base_and_data


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return base_and_data(tmp_path_factory.mktemp("saved")).parent


@pytest.fixture
def base(tmp_path, saved):
    """A checkpoint folder, beside ``d.jsonl``."""
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    return tmp_path / "base"


@pytest.fixture
def out(base):
    """Where a run named "run" goes."""
    return base.parent / "run"


@pytest.fixture
def fake(monkeypatch):
    """A FakeLoss in the forward pass's place, and a fixed loss on evaluation data."""
    loss = FakeLoss()
    monkeypatch.setattr(step_module, "batch_loss", loss)
    monkeypatch.setattr(scores, "mean_loss", lambda *_: 0.25)
    return loss


@pytest.fixture
def steps(monkeypatch):
    """What the optimizer is told: a rate and the gradients by name, of every step."""
    told = []

    class Recorded(MasterAdamW):
        def step(self, lr: float) -> float:
            told.append((lr, {n: p.grad.clone() for n, p in self.params.items() if p.grad is not None}))
            return super().step(lr)

    monkeypatch.setattr(step_module, "MasterAdamW", Recorded)
    return told

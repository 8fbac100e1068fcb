"""Trainings by several processes beside the same ones by one."""

import importlib
import os
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

from esft.training.optim import MasterAdamW
from tests.esft.models import write_records
from tests.esft.parallel.jobs import job
from tests.esft.small_runs import SELECTION, base_and_data, column, run, settings

steps_module = importlib.import_module("esft.training.steps")
loop = importlib.import_module("esft.training.loop")

PLAIN = settings(steps=4, save_every=2, eval_every=4, dtype="float32")
# Three records for four ranks leave one without any; the parts of a rank are uneven.
BALANCED = settings(method="full", steps=2, batch_size=3, aux_loss=2.0, dtype="float32")
UNEVEN = settings(steps=2, batch_size=7, micro_batch_size=2, dtype="float32")
RUNS = {"plain": (PLAIN, SELECTION), "balanced": (BALANCED, None), "uneven": (UNEVEN, SELECTION)}


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


def trainings(base, end: str) -> list[float]:
    """Every one of ``RUNS``, and one that is begun; gradients beside each. Returns their losses on evaluation data."""
    steps_module.MasterAdamW = Recorded
    losses = []
    for name, (config, selection) in RUNS.items():
        Recorded.kept, Recorded.count = {}, 0
        losses.append(run(base, f"{name}-{end}", config, selection).eval_loss)
        save_file(Recorded.kept, base.parent / f"{name}-{end}-{os.environ.get('RANK', 0)}.safetensors")
    return losses


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A checkpoint's folder with ``RUNS`` beside it, by one process, by 2 and by 4."""
    base = base_and_data(tmp_path_factory.mktemp("ranks"))
    write_records(base.parent / "d.jsonl", 21)
    patched = steps_module.MasterAdamW
    try:
        trainings(base, "1")
    finally:
        steps_module.MasterAdamW = patched
    for size in (2, 4):
        (folder := base.parent / f"job-{size}").mkdir()
        ended = job(folder, size, partial(trainings, base, str(size)))
        assert [e.status for e in ended] == [0] * size, ended
        assert [e.said for e in ended[1:]] == [""] * (size - 1)
        assert all(e.value == ended[0].value for e in ended)
    return base


def gradients(base, name: str, size: int, rank: int = 0) -> dict[str, torch.Tensor]:
    return load_file(base.parent / f"{name}-{size}-{rank}.safetensors")


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("size", [2, 4])
def test_loss_and_every_gradient_are_those_of_a_single_process(base, size: int, name: str):
    alone, several = (base.parent / f"{name}-{n}" for n in (1, size))
    figures = ("loss", "grad_norm", "eval_loss", *(["aux_loss"] if name == "balanced" else []))
    for figure in figures:
        assert column(several, figure) == pytest.approx(column(alone, figure), rel=2e-5)
    expected, found = gradients(base, name, 1), gradients(base, name, size)
    assert found.keys() == expected.keys()
    first = {n: g for n, g in expected.items() if n.startswith("1/")}  # later ones are of weights that differ a little
    assert first
    for n, gradient in first.items():
        torch.testing.assert_close(found[n], gradient, rtol=1e-4, atol=2e-6 * float(gradient.abs().max()) + 1e-9)


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("size", [2, 4])
def test_every_rank_steps_with_the_same_bits(base, size: int, name: str):
    first, *others = (gradients(base, name, size, rank) for rank in range(size))
    for other in others:
        assert other.keys() == first.keys() and all(torch.equal(other[n], g) for n, g in first.items())

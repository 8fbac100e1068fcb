"""Trainings by several processes beside the same ones by one."""

import importlib
import os
import shutil
import signal
import time
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

from esft.errors import Interrupted
from esft.optimizer.adamw import MasterAdamW
from esft.parallel import experts
from esft.parallel.deal import dealt
from esft.parallel.ranks import Ranks
from esft.parallel.watch import STATUS
from esft.training.steps import Steps
from tests.esft.models import tiny_tokenizer, write_records
from tests.esft.parallel.jobs import job
from tests.esft.small_runs import SELECTION, Recorded, base_and_data, column, metrics, run, settings

steps_module = importlib.import_module("esft.training.steps")
loop = importlib.import_module("esft.training.loop")

PLAIN = settings(steps=4, save_every=2, eval_every=4, dtype="float32")
# Three records for four ranks leave one without any; the parts of a rank are uneven.
BALANCED = settings(method="full", steps=2, batch_size=3, aux_loss=2.0, dtype="float32")
UNEVEN = settings(steps=2, batch_size=7, micro_batch_size=2, dtype="float32")
PACKED = settings(steps=2, batch_size=5, packing=True, max_length=60, dtype="float32")
HELD = settings(steps=2, batch_size=6, kl_weight=0.5, dtype="float32")
# By a figure that gets no better with training: the first evaluation is the best one, and two more end the run.
BEST = settings(
    steps=6, eval_every=1, save_every=9, greater_is_better=True, load_best_model_at_end=True,
    early_stopping_patience=2, dtype="float32",
)  # fmt: skip
DEALT = settings(steps=3, save_every=1, shard="experts", dtype="float32")
RUNS = {
    "plain": (PLAIN, SELECTION), "balanced": (BALANCED, None), "uneven": (UNEVEN, SELECTION),
    "packed": (PACKED, SELECTION), "held": (HELD, SELECTION), "best": (BEST, SELECTION),
}  # fmt: skip
FIGURES = {"balanced": ["aux_loss"], "held": ["kl"]}


class InTurn(Ranks):
    """One process that does what two would, one after the other."""

    def rounds(self, rows, length, together):
        shares = dealt([length(row) for row in rows], 2)
        return [([rows[i] for i in share], len(share)) for share in shares]


def trainings(base, end: str) -> list:
    """Every one of ``RUNS``; gradients beside each. Returns steps, best step and last loss on evaluation data."""
    steps_module.MasterAdamW = Recorded
    found = []
    for name, (config, selection) in RUNS.items():
        Recorded.kept, Recorded.count = {}, 0
        more = {"mix": f"{base.parent / 'general.jsonl'}:0.4"} if config.kl_weight else {}
        result = run(base, f"{name}-{end}", config, selection, **more)
        found.append([result.steps, result.best_step, result.eval_loss])
        save_file(Recorded.kept, base.parent / f"{name}-{end}-{os.environ.get('RANK', 0)}.safetensors")
    return found


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A checkpoint's folder with ``RUNS`` beside it, by one process, by 2 and by 4."""
    base = base_and_data(tmp_path_factory.mktemp("ranks"))
    write_records(base.parent / "d.jsonl", 21)
    write_records(base.parent / "general.jsonl", 9)
    patched = steps_module.MasterAdamW
    try:
        alone = trainings(base, "1")
    finally:
        steps_module.MasterAdamW = patched
    for size in (2, 4):
        (folder := base.parent / f"job-{size}").mkdir()
        ended = job(folder, size, partial(trainings, base, str(size)))
        assert [e.status for e in ended] == [0] * size, ended
        assert [e.said for e in ended[1:]] == [""] * (size - 1)
        assert all(e.value == ended[0].value for e in ended)
        assert [each[:2] for each in ended[0].value] == [each[:2] for each in alone]
        assert ended[0].value[-1][:2] == [3, 1]
    return base


def gradients(base, name: str, size: int, rank: int = 0) -> dict[str, torch.Tensor]:
    return load_file(base.parent / f"{name}-{size}-{rank}.safetensors")


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("size", [2, 4])
def test_loss_and_every_gradient_are_those_of_a_single_process(base, size: int, name: str):
    alone, several = (base.parent / f"{name}-{n}" for n in (1, size))
    for figure in ("loss", "grad_norm", "eval_loss", *FIGURES.get(name, [])):
        assert column(alone, figure)
        # A divergence is what is left of numbers that nearly cancel: it has their rounding.
        rounding = 1e-6 if figure == "kl" else 0.0
        assert column(several, figure) == pytest.approx(column(alone, figure), rel=2e-5, abs=rounding)
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


def test_two_ranks_leave_the_bytes_of_one_process_that_adds_up_the_same_parts(base, monkeypatch):
    monkeypatch.setattr(loop, "joined", lambda: nullcontext(InTurn()))
    run(base, "plain-in-turn", *RUNS["plain"])
    found, expected = (base.parent / f"plain-{end}" for end in ("2", "in-turn"))
    # Not the checkpoint's own file: its losses are added up in another order.
    for name in ("checkpoints/step-000002/state.safetensors", "adapter/adapter.safetensors", "adapter/expert_cfg.json"):
        assert (found / name).read_bytes() == (expected / name).read_bytes(), name


@pytest.mark.parametrize("size", [2, 4])
def test_the_first_rank_alone_leaves_a_run_as_a_single_process_does(base, size: int):
    alone, several = (base.parent / f"plain-{n}" for n in (1, size))
    files = [{str(path.relative_to(run)) for path in run.rglob("*")} for run in (alone, several)]
    board = [{name for name in found if "tfevents" in name} for found in files]
    assert len(board[0]) == len(board[1]) == 1 and files[0] - board[0] == files[1] - board[1]
    for name in ("config.yaml", "experts.json", "origin.json", "esft_run.json", "adapter/expert_cfg.json"):
        assert (several / name).read_bytes() == (alone / name).read_bytes()
    assert [line.keys() for line in metrics(several)] == [line.keys() for line in metrics(alone)]


@pytest.mark.parametrize("name", [name for name, (config, _) in RUNS.items() if config.method == "esft"])
@pytest.mark.parametrize("size", [2, 4])
def test_adapters_are_those_of_a_single_process(base, size: int, name: str):
    expected, found = (load_file(base.parent / f"{name}-{n}" / "adapter" / "adapter.safetensors") for n in (1, size))
    assert found.keys() == expected.keys()
    for n, tensor in found.items():
        # Four steps of at most 3e-3: where a gradient is nearly zero, Adam makes much of a rounding.
        torch.testing.assert_close(tensor, expected[n], rtol=1e-3, atol=2e-4)


def until_stopped(base) -> list:
    config = settings(steps=10_000, save_every=10_000, dtype="float32")
    try:
        run(base, "stopped", config, eval_data=None)
    except Interrupted as error:
        return [error.signal, error.resumable]
    return []


def goes_on(base, steps: int, copy: str) -> float:
    config = settings(steps=steps, save_every=10_000, dtype="float32")
    return run(base, copy, config, eval_data=None, resume=True).train_loss


def test_a_signal_to_one_rank_stops_all_with_a_checkpoint_that_any_number_of_ranks_goes_on_from(base, tmp_path):
    lines = base.parent / "stopped" / "metrics.jsonl"

    def then(pids: list[int]) -> None:
        while not lines.is_file() or lines.read_text().count("\n") < 3:
            time.sleep(0.02)
        os.kill(pids[1], signal.SIGTERM)

    ended = job(tmp_path, 2, partial(until_stopped, base), then)
    assert [(e.status, e.value) for e in ended] == [(0, [signal.SIGTERM, True])] * 2
    (saved,) = (base.parent / "stopped" / "checkpoints").iterdir()
    done = int(saved.name.removeprefix("step-"))
    assert done == len(column(base.parent / "stopped", "loss"))
    losses = []
    for size in (1, 3):
        shutil.copytree(base.parent / "stopped", base.parent / f"stopped-{size}")
        work = partial(goes_on, base, done + 3, f"stopped-{size}")
        losses.append(work() if size == 1 else job(tmp_path, size, work)[0].value)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert column(base.parent / "stopped-1", "loss") == pytest.approx(
        column(base.parent / "stopped-3", "loss"), rel=1e-4
    )


def drifts(base) -> None:
    class Drifting(MasterAdamW):
        def step(self, lr: float) -> float:
            return super().step(lr * (1 + 1e-6 * float(os.environ["RANK"])))

    steps_module.MasterAdamW = Drifting
    run(base, "drifted", settings(steps=4, save_every=2, lr=1e-2, dtype="float32"), eval_data=None)


def test_ranks_that_have_drifted_apart_write_no_checkpoint(base, tmp_path):
    ended = job(tmp_path, 2, partial(drifts, base))
    assert sorted(e.status for e in ended) == [1, 2]
    assert "rank 1 has other state after step 2 than rank 0" in "".join(e.said for e in ended)
    assert not any((base.parent / "drifted").glob("checkpoints/*"))


def retold(base) -> None:
    run(base, "told", settings(steps=3, dtype="float32"), eval_data=None, resume=True)


def test_two_ranks_do_not_go_on_with_another_chat_template(base, tmp_path):
    run(base, "told", settings(steps=2, dtype="float32"), eval_data=None)
    shutil.copytree(base, tmp_path / "base")
    shutil.copytree(base.parent / "told", tmp_path / "told")
    shutil.copy(base.parent / "d.jsonl", tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = str(tokenizer.chat_template).replace("<|end|>", "<|end|> ")
    tokenizer.save_pretrained(tmp_path / "base")
    ended = job(tmp_path, 2, partial(retold, tmp_path / "base"))
    assert sorted(e.status for e in ended) == [1, 2]
    assert "the run was begun with another chat template" in "".join(e.said for e in ended)
    assert len(column(tmp_path / "told", "loss")) == 2


def dies_in_a_step(base, way: str) -> None:
    """A training with experts dealt out, in whose second step rank 1 is killed between two exchanges of a layer."""
    real, update, begun = getattr(experts._Sum, way), Steps.update, []

    def dies(*args):
        if os.environ["RANK"] == "1" and begun[-1:] == [2]:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args)

    setattr(experts._Sum, way, staticmethod(dies))
    Steps.update = lambda self, step, rows: begun.append(step) or update(self, step, rows)
    run(base, f"killed-{way}", DEALT, eval_data=None)


@pytest.mark.parametrize("way", ["forward", "backward"])
def test_a_rank_that_is_killed_amid_a_step_of_dealt_experts_is_named_and_the_last_checkpoint_goes_on(
    base, tmp_path, way: str
):
    began, killed = time.monotonic(), base.parent / f"killed-{way}"
    pids = []
    ended = job(tmp_path, 3, partial(dies_in_a_step, base, way), pids.extend)
    assert time.monotonic() - began < 30
    assert [e.status for e in ended] == [STATUS, -signal.SIGKILL, STATUS]
    lines = [line for e in ended for line in e.said.splitlines() if not line.startswith("Loading weights")]
    assert list(filter(None, lines)) == [
        f"esft: rank 1: has died (process {pids[1]} is gone; killed, or out of memory?)"
    ]
    assert [path.name for path in (killed / "checkpoints").iterdir()] == ["step-000001"]
    assert not (killed / "adapter").exists()
    assert run(base, killed.name, DEALT, eval_data=None, resume=True).steps == 3

"""What the loop logs and stores; whole runs are in test_runs."""

import importlib
import itertools
import json
import os
import shutil
import signal
import sys
import threading
import warnings
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import esft
from esft.data.batches import epoch_batches
from esft.data.encoding import encode_all
from esft.data.sources import read_records
from esft.evaluation import scores
from esft.memory import peak_rss
from esft.optimizer.schedule import learning_rate
from esft.parallel.ranks import Ranks
from esft.selection import ExpertSelection
from esft.training import steps as steps_module
from tests.esft.models import chat, save_tiny, tiny_encoder, tiny_model, write_records
from tests.esft.parallel.jobs import FirstOfTwo, job
from tests.esft.small_runs import SELECTION, breaks, column, metrics, run, settings

train_module = importlib.import_module("esft.training.loop")  # ``esft.train`` is the function
PAD = 258


def test_what_is_to_show_the_figures_is_looked_for_before_anything_is_written(base, out, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(esft.InputError, match="^report_to wandb needs the wandb package"):
        run(base, "run", settings(report_to="wandb"))
    assert not out.exists()


def test_what_a_model_draws_while_it_is_made_depends_on_the_seed(base, fake, monkeypatch):
    seeds, real = [], train_module.METHODS["esft"].prepare
    prepare = staticmethod(lambda *how: seeds.append(torch.initial_seed()) or real(*how))
    monkeypatch.setattr(train_module.METHODS["esft"], "prepare", prepare)
    for name, seed in (("a", 5), ("b", 6)):
        run(base, name, settings(steps=1, seed=seed), eval_data=None)
    assert seeds == [5, 6]


def test_the_loss_of_a_run_is_the_mean_of_its_last_twenty_steps(base, fake):
    result = run(base, "run", settings(steps=23, save_every=99), eval_data=None)
    assert result.train_loss == pytest.approx(sum(10 - call for call in range(4, 24)) / 20)
    assert result.eval_loss is None
    assert column(base.parent / "run", "eval_loss") == []


def test_a_resumed_run_has_the_weights_and_moments_of_the_broken_one(base, out, monkeypatch):
    config = settings(steps=4, save_every=2, dtype="bfloat16")
    run(base, "whole", config)
    real, count = steps_module.batch_loss, breaks(4)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(steps_module, "batch_loss", lambda *args: count() or real(*args))
        run(base, "run", config)
    run(base, "run", None, None, resume=True)  # with the settings and the selection that it was begun with
    one, other = (load_file(base.parent / r / "adapter" / "adapter.safetensors") for r in ("whole", "run"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert column(out, "loss") == column(base.parent / "whole", "loss")


def test_a_run_that_has_ended_goes_on_for_more_steps_and_not_for_fewer(base, out, fake):
    run(base, "run", settings(steps=4, save_every=2), eval_data=None)
    assert run(base, "run", settings(steps=5, save_every=2), resume=True, eval_data=None).steps == 5
    assert column(out, "step") == [1, 2, 3, 4, 5]
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for few in (1, 4):
        with pytest.raises(esft.InputError, match=f"^cannot resume with steps {few}: .*/run has done 5$"):
            run(base, "run", settings(steps=few, save_every=2), resume=True, eval_data=None)
        assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_bad_input_leaves_nothing_behind(base):
    folder = base.parent
    bad, long, inside = folder / "bad.jsonl", folder / "long.jsonl", folder / "other" / "inside.jsonl"
    bad.write_text("{\n")
    long.write_text(json.dumps({"messages": chat("x" * 50, "y")}) + "\n")
    save_tiny(folder / "other")
    write_records(inside)
    (folder / "file").write_text("")
    for name, held in (("half", "config.yaml"), ("rest", "origin.json")):
        (folder / name).mkdir()
        (folder / name / held).write_text("{}")
    there = sorted(folder.rglob("*"))
    usual = {"model_path": str(base), "data": folder / "d.jsonl", "out": "x", "config": settings()}
    cases = [
        ({"selection": None, "config": None}, "method esft needs expert selection"),
        ({"config": settings(method="full")}, "method full takes no expert selection"),
        ({"config": settings(method="lora")}, "method lora takes no expert selection"),
        ({"selection": ExpertSelection({9: [0]})}, "names layer 9"),
        ({"selection": ExpertSelection({1: []})}, "selection is empty"),
        ({"model_path": str(folder / "no")}, "no: no such folder"),
        ({"data": bad}, "bad.jsonl: line 1"),
        ({"eval_data": bad}, "bad.jsonl: line 1"),
        ({"data": long, "config": settings(max_length=30)}, "long.jsonl: no record has its answer within 30 tokens"),
        ({"eval_data": long, "config": settings(max_length=30)}, "long.jsonl: no record has its answer within 30"),
        ({"resume": True}, "x: holds no run to resume"),
        ({"resume": True, "out": "half"}, "half: holds no run to resume"),
        ({"resume": True, "out": "rest"}, "rest: holds no run to resume"),
        ({"resume": True, "overwrite": True}, "`resume=True` and `overwrite=True` exclude each other"),
        ({"out": "other"}, "other: holds something already"),
        ({"out": "file", "overwrite": True}, "file: is a file"),
        ({"out": "other", "overwrite": True}, r"other: holds no run \(no esft_run.json\), and is not overwritten"),
        ({"out": "base", "overwrite": True}, "would replace .*base, which is read"),
        ({"out": "d.jsonl"}, "would replace .*d.jsonl, which is read"),
        ({"out": "other", "overwrite": True, "data": inside}, "would replace .*inside.jsonl, which is read"),
        ({"out": "other", "overwrite": True, "eval_data": inside}, "would replace .*inside.jsonl, which is read"),
    ]
    for change, message in cases:
        given = {**usual, "selection": SELECTION, **change}
        with pytest.raises(esft.InputError, match=message):
            esft.train(**{**given, "out": folder / given["out"]})
        assert sorted(folder.rglob("*")) == there


def tree(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Stopped(Exception):
    """Ends a run in a test."""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("at", [1, 5, 7, 12])
def test_a_signal_stops_the_run_after_the_step_and_the_resumed_one_is_the_unbroken_one(
    base, out, fake, at: int, number: int
):
    whole = run(base, "whole", settings())
    lines = {name: column(base.parent / "whole", name) for name in ("step", "loss", "eval_loss")}
    fake.batches.clear()
    fake.before = lambda: len(fake.batches) == at - 1 and os.kill(os.getpid(), number)
    with pytest.raises(esft.errors.Interrupted, match=f"^{out}: stopped after step {at}, which is saved$") as raised:
        run(base, "run", settings())
    assert (raised.value.signal, raised.value.resumable) == (number, True)
    assert isinstance(raised.value, KeyboardInterrupt)
    assert column(out, "step")[-1] == len(fake.batches) == at
    assert json.loads((out / "checkpoints" / f"step-{at:06d}" / "state.json").read_text())["step"] == at
    assert not (out / ".esft.lock").exists() and not (out / "adapter").exists()
    fake.before = lambda: None
    resumed = run(base, "run", settings(), resume=True)
    assert {name: column(out, name) for name in lines} == lines
    assert (resumed.train_loss, resumed.eval_loss) == (whole.train_loss, whole.eval_loss)
    for name in ("adapter/adapter.safetensors", "adapter/manifest.json", "config.yaml", "experts.json", "origin.json"):
        assert (out / name).read_bytes() == (base.parent / "whole" / name).read_bytes()


def test_a_run_in_a_thread_ends_as_elsewhere(base, out, fake):
    thread = threading.Thread(target=lambda: run(base, "run", settings(steps=2)))
    thread.start()
    thread.join()
    assert json.loads((out / "summary.json").read_text())["steps"] == 2


def test_a_diverged_or_broken_run_takes_nothing_from_the_one_that_it_was_to_replace(base, out, fake, monkeypatch):
    run(base, "run", settings(steps=3, save_every=2), eval_data=None)
    before = tree(out)

    def fails(at: int, error):
        def before_step():
            if len(fake.batches) == at:
                raise error

        fake.batches.clear()
        fake.before = before_step

    for error in (esft.DivergenceError("step 4: loss nan"), Stopped()):
        fails(3, error)
        with pytest.raises(type(error)):
            run(base, "run", settings(steps=8, save_every=2, lr=0.5), overwrite=True, eval_data=None)
        assert {name: b for name, b in tree(out).items() if not name.startswith("overwriting/")} == before
    assert column(out / "overwriting", "step") == [1, 2, 3]
    fake.before = lambda: None
    run(base, "run", settings(steps=8, save_every=2, lr=0.5), resume=True, eval_data=None)
    assert column(out, "step") == list(range(1, 9)) and not (out / "overwriting").exists()
    assert not list(out.rglob(".*"))


def test_two_trainings_in_one_folder_are_refused_and_the_first_goes_on(base, out, fake):
    refused = []

    def another() -> None:
        if len(fake.batches) != 2:
            return
        for more in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(esft.InputError) as raised:
                run(base, "run", settings(lr=0.5), **more)
            refused.append(str(raised.value))

    fake.before = another
    run(base, "run", settings(), eval_data=None)
    assert len(refused) == 3 and all(f"{out}: in use by process {os.getpid()} on " in line for line in refused)
    assert column(out, "step") == list(range(1, 13)) and not list(out.rglob(".*"))


@pytest.mark.parametrize("progress", [True, False])
def test_progress_is_shown_where_it_is_wanted(base, fake, capfd, progress: bool):
    run(base, "run", settings(steps=4, save_every=2), eval_data=None, progress=progress)
    run(base, "run", settings(steps=5, save_every=2), eval_data=None, progress=progress, resume=True)
    shown = capfd.readouterr().err.replace("\r", "\n").splitlines()
    bars = [line for line in shown if line.startswith("esft")]
    assert bool(bars) == progress
    if progress:
        assert "0/4" in bars[0] and any("4/4" in bar and "loss=7.500" in bar for bar in bars)
        assert any("2/5" in bar for bar in bars) and "5/5" in bars[-1]


def test_the_metrics_hold_every_step_and_every_evaluation(base, out, fake, steps, monkeypatch):
    asked, clock = [], itertools.count()
    for module in (train_module, steps_module):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))  # 1 s a look
    monkeypatch.setattr(train_module, "peak_memory", lambda: 123)

    def evaluate(model, examples, pad: int, batch_size: int) -> float:
        asked.append((len(examples), pad, batch_size))
        model.eval()
        return 0.5 + len(asked)

    monkeypatch.setattr(scores, "mean_loss", evaluate)
    write_records(base.parent / "e.jsonl", 5)
    config = settings(steps=5, eval_every=2, micro_batch_size=4, warmup_steps=2, decay=0.4)
    result = run(base, "run", config, eval_data=base.parent / "e.jsonl")

    examples = encode_all(tiny_encoder(), read_records(base.parent / "d.jsonl"), "d")
    batches = [b for epoch in range(2) for b in epoch_batches(examples, 8, 0, epoch)][:5]
    counts = [sum(len(examples[i].ids) for i in batch) for batch in batches]
    expected = []
    for step, evaluated in zip(range(5), (None, 1.5, None, 2.5, 3.5), strict=True):
        # Two parts of alike size a step: calls 1 and 2 have losses 9 and 8, and so on.
        loss = pytest.approx(8.5 - 2 * step)
        speed = counts[step] / 1.0
        line = {"loss": loss, "lr": learning_rate(config, step), "grad_norm": 0.0, "tokens_per_second": speed}
        expected += [{"step": step + 1, **line}]
        expected += [{"step": step + 1, "eval_loss": evaluated}] if evaluated else []
    assert metrics(out) == expected
    assert asked == [(5, PAD, 4)] * 3
    assert fake.training == [True] * 10
    assert [rate for rate, _ in steps] == [learning_rate(config, step) for step in range(5)]

    assert (result.steps, result.eval_loss, result.peak_gpu_memory) == (5, 3.5, 123)
    assert result.trained_parameters == 3 * 3 * 20 * 32  # three experts of three matrices
    assert result.seconds == 11.0  # the loop looks at the clock twice a step, and before and after
    assert result.tokens_per_second == sum(counts) / 11.0
    assert 2**20 < result.peak_rss <= peak_rss()
    stored = (out / "adapter" / "adapter.safetensors").stat().st_size
    assert result.stored_bytes == stored > 4 * result.trained_parameters
    origin = {"model": str(base), "data": str(base.parent / "d.jsonl")}
    assert json.loads((out / "summary.json").read_text()) == {"method": "esft", **origin, **vars(result)}
    assert (result.before, result.after, result.best_step) == ({}, {"eval_loss": 3.5}, None)

    board = EventAccumulator(str(out / "tensorboard")).Reload()
    for name in ("loss", "lr", "grad_norm", "tokens_per_second", "eval_loss"):
        logged = [(line["step"], line[name]) for line in metrics(out) if name in line]
        assert [(e.step, e.value) for e in board.Scalars(name)] == [(s, pytest.approx(v)) for s, v in logged]


def test_a_run_is_kept_unless_overwritten_and_then_goes_whole(base, out, fake):
    run(base, "run", settings(steps=3, save_every=2), eval_data=None)
    before = sorted(out.rglob("*"))
    with pytest.raises(esft.InputError, match="holds something already"):
        run(base, "run", settings(steps=1))
    (base.parent / "bad.jsonl").write_text("{\n")
    with pytest.raises(esft.InputError, match="line 1"):
        run(base, "run", settings(steps=1), overwrite=True, eval_data=base.parent / "bad.jsonl")
    assert sorted(out.rglob("*")) == before
    run(base, "run", settings(steps=2), overwrite=True, eval_data=None)
    assert column(out, "step") == [1, 2]
    assert sorted(p.name for p in out.iterdir()) == sorted(
        "adapter config.yaml esft_run.json experts.json metrics.jsonl origin.json summary.json tensorboard".split()
    )


@pytest.mark.parametrize("there", [True, False])
def test_overwriting_takes_an_empty_folder_and_none(base, out, fake, there: bool):
    if there:
        out.mkdir()
    run(base, "run", settings(steps=1), overwrite=True, eval_data=None)
    assert column(out, "step") == [1]


def test_where_a_run_writes_may_be_a_folder_below_others_that_are_not_there(base, fake):
    run(base, "new/below/run", settings(steps=1), eval_data=None)
    assert column(base.parent / "new" / "below" / "run", "step") == [1]


def test_a_line_says_what_is_about_to_be_done():
    about, model = train_module._about, esft.swap(tiny_model(), SELECTION)
    line = "esft: 3 experts of 2 layers, 5,760 parameters, 1 step of 8 records"
    assert about(model, settings(steps=1), SELECTION, 0, []) == line
    line = "esft: 5,760 parameters, 3 more steps of 8 packed rows, loss of evaluation data, b every 6"
    assert about(model, settings(steps=5, packing=True), None, 2, ["", "b"]) == line


def test_a_run_whose_checkpoints_are_gone_begins_anew_and_says_so(base, out, fake):
    run(base, "run", settings(steps=5, save_every=2), eval_data=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        run(base, "run", settings(steps=7, save_every=2), resume=True, eval_data=None)
    shutil.rmtree(out / "checkpoints")
    with pytest.warns(UserWarning, match="its checkpoints are gone; the run begins at its first step"):
        run(base, "run", settings(steps=8, save_every=2), resume=True, eval_data=None)
    assert column(out, "step") == list(range(1, 9))


def test_where_patience_ends_a_run_its_outcome_is_that_of_the_best_step_and_it_says_so(base, fake, monkeypatch, caplog):
    losses = {0: 9.0, 2: 3.0, 4: 4.0, 6: 5.0}
    monkeypatch.setattr(train_module.Evaluations, "_measured", lambda self, step: {"eval_loss": losses[step]})
    patient = {"eval_every": 2, "load_best_model_at_end": True, "early_stopping_patience": 2, "eval_on_start": True}
    with caplog.at_level("INFO", "esft"):
        result = run(base, "run", settings(steps=8, save_every=3, **patient))
    assert (result.steps, result.best_step) == (6, 2)
    assert (result.before, result.after, result.eval_loss) == ({"eval_loss": 9.0}, {"eval_loss": 3.0}, 3.0)
    said = [record.getMessage() for record in caplog.records]
    assert "ended after step 6: eval_loss no better in 2 evaluations" in said
    assert "kept step 2, the best by eval_loss" in said
    caplog.clear()
    with caplog.at_level("INFO", "esft"):
        run(base, "whole", settings(steps=4, save_every=3, **patient))
    assert not any("ended after" in record.getMessage() for record in caplog.records)


def test_frozen_weights_are_cut_up_from_the_cpus_memory_where_there_are_several_processes(base, fake, monkeypatch):
    wanted, cut = [], []
    monkeypatch.setattr(train_module, "in_host_memory", lambda there: wanted.append(there) or nullcontext())
    monkeypatch.setattr(train_module, "shard_frozen", lambda model, ranks, device, apart: cut.append(ranks.size))
    for shard, ranks in (
        ("none", FirstOfTwo()),
        ("frozen", FirstOfTwo()),
        ("frozen", Ranks()),
        ("experts", FirstOfTwo()),
        ("all", FirstOfTwo()),
    ):
        monkeypatch.setattr(train_module, "joined", lambda ranks=ranks: nullcontext(ranks))
        run(base, f"{shard}-{ranks.size}", settings(steps=1, shard=shard), eval_data=None)
    assert (wanted, cut) == ([False, True, False, False, True], [2, 1, 2])


def test_what_is_held_to_the_base_is_not_cut_up(base, fake, monkeypatch):
    monkeypatch.setattr(train_module, "joined", lambda: nullcontext(FirstOfTwo()))
    for shard in ("frozen", "experts", "all"):
        held = settings(steps=1, kl_weight=1.0, shard=shard)
        with pytest.raises(
            esft.InputError, match=f"^kl_weight does not go together with shard {shard} over processes$"
        ):
            run(base, "run", held, eval_data=None, mix=f"{base.parent / 'd.jsonl'}:0.5")


def unlike(base, what: str) -> None:
    second = os.environ["RANK"] == "1"
    config, selection, data = settings(steps=1), SELECTION, base.parent / "d.jsonl"
    evaluated, folder = data, base
    if second and what == "setting lr":
        config = settings(steps=1, lr=1e-3)
    if second and what == "selection":
        selection = ExpertSelection({1: [2, 6], 2: [0]})
    if second and what == "data":
        write_records(data := base.parent / "other.jsonl", 20)
    if second and what == "evaluation data":
        write_records(evaluated := base.parent / "other.jsonl", 20)
    if second and what == "model":
        folder = save_tiny(base.parent / "other", seed=1)
    esft.train(str(folder), data, base.parent / "unlike", config, selection, evaluated, progress=False)


@pytest.mark.parametrize("what", ["setting lr", "selection", "data", "evaluation data", "model"])
def test_ranks_that_differ_are_found_out_before_anything_is_written(base, tmp_path, what: str):
    ended = job(tmp_path, 2, partial(unlike, base, what))
    assert sorted(e.status for e in ended) == [1, 2]
    assert f"esft.errors.RankError: rank 1 has other {what} than rank 0" in "".join(e.said for e in ended)
    assert not (base.parent / "unlike").exists()

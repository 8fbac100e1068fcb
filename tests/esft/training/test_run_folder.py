"""What the loop computes, logs and stores, step by step; whole runs are in test_train_runs."""

import hashlib
import importlib
import itertools
import json
import shutil
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import esft
from esft.checkpoint.device import peak_rss
from esft.checkpoint.digest import model_digest
from esft.checkpoint.load import load_model
from esft.selection import ExpertSelection
from esft.training.config import TrainConfig
from esft.training.data import encode_all, epoch_batches, read_records
from esft.training.run_folder import RunFolder
from tests.esft.models import save_tiny, tiny_tokenizer, write_records
from tests.esft.runs import SELECTION, column, metrics, run, settings

train_module = importlib.import_module("esft.training.loop")  # ``esft.train`` is the function
PAD = 258


def test_the_metrics_hold_every_step_and_every_evaluation(base, out, fake, steps, monkeypatch):
    asked, clock = [], itertools.count()
    monkeypatch.setattr(train_module, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))  # 1 s a look
    monkeypatch.setattr(train_module, "peak_memory", lambda: 123)

    def evaluate(model, examples, pad: int, batch_size: int) -> float:
        asked.append((len(examples), pad, batch_size))
        model.eval()
        return 0.5 + len(asked)

    monkeypatch.setattr(train_module, "mean_loss", evaluate)
    write_records(base.parent / "e.jsonl", 5)
    config = settings(steps=5, eval_every=2, micro_batch_size=4, warmup_steps=2, decay=0.4)
    result = run(base, "run", config, eval_data=base.parent / "e.jsonl")

    examples = encode_all(tiny_tokenizer(), read_records(base.parent / "d.jsonl"), 99, "d")
    batches = [b for epoch in range(2) for b in epoch_batches(examples, 8, 0, epoch)][:5]
    counts = [sum(len(examples[i].ids) for i in batch) for batch in batches]
    expected = []
    for step, evaluated in zip(range(5), (None, 1.5, None, 2.5, 3.5), strict=True):
        # Two parts of alike size a step: calls 1 and 2 have losses 9 and 8, and so on.
        loss = pytest.approx(8.5 - 2 * step)
        speed = counts[step] / 1.0
        line = {"loss": loss, "lr": config.rate(step), "grad_norm": 0.0, "tokens_per_second": speed}
        expected += [{"step": step + 1, **line}]
        expected += [{"step": step + 1, "eval_loss": evaluated}] if evaluated else []
    assert metrics(out) == expected
    assert asked == [(5, PAD, 4)] * 3
    assert fake.training == [True] * 10
    assert [rate for rate, _ in steps] == [config.rate(step) for step in range(5)]

    assert (result.steps, result.eval_loss, result.peak_gpu_memory) == (5, 3.5, 123)
    assert result.trained_parameters == 3 * 3 * 20 * 32  # three experts of three matrices
    assert result.seconds == 11.0  # the loop looks at the clock twice a step, and before and after
    assert result.tokens_per_second == sum(counts) / 11.0
    assert 2**20 < result.peak_rss <= peak_rss()
    stored = (out / "adapter" / "adapter.safetensors").stat().st_size
    assert result.stored_bytes == stored > 4 * result.trained_parameters
    origin = {"model": str(base), "data": str(base.parent / "d.jsonl")}
    assert json.loads((out / "summary.json").read_text()) == {"method": "esft", **origin, **vars(result)}

    board = EventAccumulator(str(out / "tensorboard")).Reload()
    for name in ("loss", "lr", "grad_norm", "tokens_per_second", "eval_loss"):
        logged = [(line["step"], line[name]) for line in metrics(out) if name in line]
        assert [(e.step, e.value) for e in board.Scalars(name)] == [(s, pytest.approx(v)) for s, v in logged]


def test_a_checkpoint_is_left_every_so_many_steps_but_not_at_the_end_and_the_last_one_stays(base, out, fake):
    seen = []
    fake.before = lambda: seen.append(sorted(p.name for p in (out / "checkpoints").glob("*")))
    run(base, "run", settings(steps=6, save_every=2), eval_data=None)
    assert seen == [[], [], ["step-000002"], ["step-000002"], ["step-000004"], ["step-000004"]]
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["step-000004"]
    assert json.loads((out / "checkpoints" / "step-000004" / "state.json").read_text()) == {"step": 4}


def breaks(at: int):
    calls = itertools.count(1)

    def count() -> None:
        if next(calls) == at:
            raise KeyboardInterrupt

    return count


@pytest.mark.parametrize(("at", "begins"), [(2, 0), (6, 4)])
def test_a_broken_run_goes_on_after_its_last_checkpoint(base, out, fake, at: int, begins: int):
    config = settings(steps=8, save_every=2, batch_size=10, eval_every=1)
    run(base, "whole", config)
    whole = list(zip(fake.batches, fake.drawn, strict=True))
    fake.batches.clear(), fake.drawn.clear()
    fake.before = breaks(at)
    with pytest.raises(KeyboardInterrupt):
        run(base, "run", config)
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "lo')  # a torn line
    if begins:
        shutil.copytree(out / "checkpoints" / "step-000004", out / "checkpoints" / "step-000002")
        (out / "checkpoints" / "step-000002" / "state.safetensors").write_text("an older one that did not go")
    logged = map(json.loads, (out / "metrics.jsonl").read_text().splitlines()[:-1])
    kept = [line for line in logged if line["step"] <= begins]
    fake.batches.clear(), fake.drawn.clear()
    fake.before = lambda: None
    (events,) = (out / "tensorboard").iterdir()  # read in the order of their seconds, which a short test may share
    events.rename(events.with_name(events.name.replace(events.name.split(".")[3], "0000000001")))
    run(base, "run", config, resume=True)
    assert list(zip(fake.batches, fake.drawn, strict=True)) == whole[begins:]
    assert metrics(out)[: len(kept)] == kept
    lines = [(line["step"], "loss" in line) for line in metrics(out)]
    assert lines == [(step, of_training) for step in range(1, 9) for of_training in (True, False)]
    board = EventAccumulator(str(out / "tensorboard")).Reload()
    shown = [event.step for event in board.Scalars("loss")]
    assert shown == list(range(1, 9))


def test_a_run_resumes_with_nothing_but_its_own_base_data_selection_and_settings(base, out, fake):
    folder = base.parent
    save_tiny(folder / "other", seed=1)
    write_records(folder / "other.jsonl", 16)
    run(base, "run", settings(steps=2), eval_data=None)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    data, config = folder / "d.jsonl", settings(steps=3)
    for model, records, other, selection, message in (
        (folder / "other", data, config, SELECTION, "cannot resume with model .*other: the run was begun with another"),
        (base, folder / "other.jsonl", config, SELECTION, "cannot resume with data .*other.jsonl: the run was begun"),
        (base, data, settings(lr=1.0), SELECTION, "cannot resume with lr 1.0: the run was begun with 0.003"),
        (base, data, config, ExpertSelection({1: [2]}), "cannot resume with another expert selection than .*run/exp"),
    ):
        with pytest.raises(esft.InputError, match=message):
            esft.train(str(model), records, out, other, selection, resume=True, progress=False)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_the_run_folder_says_what_was_trained_from_what(base, out, fake):
    config = settings(steps=1)
    result = esft.train(str(base), str(base.parent / "d.jsonl"), str(out), config, SELECTION, progress=False)
    assert TrainConfig.load(out / "config.yaml") == config
    assert ExpertSelection.load(out / "experts.json") == SELECTION
    digests = {
        "model": model_digest(load_model(str(base))),
        "data": hashlib.sha256((base.parent / "d.jsonl").read_bytes()).hexdigest(),
    }
    origin = {"model": str(base), "data": str(base.parent / "d.jsonl")}
    assert json.loads((out / "origin.json").read_text()) == {**origin, "digests": digests}
    assert result.eval_loss is None


def test_a_run_is_kept_unless_overwritten_and_then_goes_whole(base, out, fake):
    run(base, "run", settings(steps=3, save_every=2), eval_data=None)
    (out / "note").write_text("of the run before")
    before = sorted(out.rglob("*"))
    with pytest.raises(esft.InputError, match="holds something already"):
        run(base, "run", settings(steps=1))
    (base.parent / "bad.jsonl").write_text("{\n")
    with pytest.raises(esft.InputError, match="line 1"):
        run(base, "run", settings(steps=1), overwrite=True, eval_data=base.parent / "bad.jsonl")
    assert sorted(out.rglob("*")) == before
    run(base, "run", settings(steps=2), overwrite=True, eval_data=None)
    assert column(out, "step") == [1, 2]
    assert not (out / "note").exists() and not (out / "checkpoints").exists()


@pytest.mark.parametrize("there", [True, False])
def test_overwriting_takes_an_empty_folder_and_none(base, out, fake, there: bool):
    if there:
        out.mkdir()
    run(base, "run", settings(steps=1), overwrite=True, eval_data=None)
    assert column(out, "step") == [1]


def test_where_a_run_writes_may_be_a_folder_below_others_that_are_not_there(base, fake):
    run(base, "new/below/run", settings(steps=1), eval_data=None)
    assert column(base.parent / "new" / "below" / "run", "step") == [1]


def write_metrics(folder, lines: list[dict]):
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_metrics_are_read_line_by_line(tmp_path):
    lines = [{"step": 1, "loss": 2.0, "lr": 0.1, "tokens_per_second": 3.0}, {"step": 1, "eval_loss": 4.0}, {"step": 2}]
    assert RunFolder(write_metrics(tmp_path, lines)).metrics() == lines


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{", r"not JSON \(Expecting property name"),
        ("[]", "names no step"),
        ("{}", "names no step"),
        ('{"step": "2"}', "names no step"),
        ('{"step": 2, "loss": 1.0}', "a loss without lr and tokens_per_second"),
        ('{"step": 2, "loss": 1.0, "lr": 1.0}', "a loss without lr and tokens_per_second"),
        ('{"step": 2, "loss": 1.0, "tokens_per_second": 1.0}', "a loss without lr and tokens_per_second"),
    ],
)
def test_a_bad_line_of_the_metrics_is_named(tmp_path, bad: str, message: str):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n' + bad)
    with pytest.raises(esft.InputError, match=f"metrics.jsonl: line 2: {message}"):
        RunFolder(tmp_path).metrics()

"""The files of a run: what it is begun with, what it logs, what it resumes from."""

import hashlib
import importlib
import itertools
import json
import shutil

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import esft
from esft.checkpoint.digest import model_digest
from esft.checkpoint.load import load_model
from esft.selection import ExpertSelection
from esft.training.config import TrainConfig
from esft.training.run_folder import RunFolder
from tests.esft.models import save_tiny, write_records
from tests.esft.runs import SELECTION, metrics, run, settings

train_module = importlib.import_module("esft.training.loop")  # ``esft.train`` is the function
PAD = 258


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


ORIGIN = {"model": "m", "data": "d", "digests": {"model": "1", "data": "2"}}


def begun(path, selection: ExpertSelection | None = SELECTION) -> RunFolder:
    folder = RunFolder(path)
    folder.begin(settings(), ORIGIN, selection)
    return folder


@pytest.mark.parametrize("lost", ["config.yaml", "origin.json", "folder"])
def test_a_run_without_what_it_was_begun_with_is_not_resumed(tmp_path, lost: str):
    folder = begun(tmp_path / "run")
    folder.check_free(resume=True, overwrite=False)
    (tmp_path / "run" / lost).unlink() if lost != "folder" else shutil.rmtree(tmp_path / "run")
    with pytest.raises(esft.InputError, match=r"run: holds no run to resume$"):
        folder.check_free(resume=True, overwrite=False)


def test_only_a_run_is_replaced_and_only_where_told(tmp_path):
    folder = begun(tmp_path / "run")
    folder.check_free(resume=False, overwrite=True)
    for resume, overwrite, message in ((False, False, "holds something already"), (True, True, "exclude each other")):
        with pytest.raises(esft.InputError, match=message):
            folder.check_free(resume, overwrite)
    (tmp_path / "run" / "config.yaml").unlink()
    with pytest.raises(esft.InputError, match=r"run: holds no run, and is not overwritten$"):
        folder.check_free(resume=False, overwrite=True)
    for free in ("new", "empty"):
        if free == "empty":
            (tmp_path / free).mkdir()
        for overwrite in (False, True):
            RunFolder(tmp_path / free).check_free(resume=False, overwrite=overwrite)


@pytest.mark.parametrize("selection", [SELECTION, None])
def test_a_run_goes_on_with_what_it_was_begun_with_unless_told_for_how_long(tmp_path, selection):
    folder = begun(tmp_path / "run", selection)
    assert folder.begun_with(None, None) == (settings(), selection)
    assert folder.begun_with(settings(steps=99), selection) == (settings(steps=99), selection)
    for config, other, message in ((settings(lr=1.0), None, "lr 1.0"), (None, ExpertSelection({1: [2]}), "selection")):
        with pytest.raises(esft.InputError, match=f"^cannot resume with .*{message}"):
            folder.begun_with(config, other)


def test_the_base_and_the_data_are_told_by_their_digests_and_named_by_their_paths(tmp_path):
    folder = begun(tmp_path / "run")
    folder.check_origin({"model": "1", "data": "2"}, {"model": "elsewhere", "data": "d"})
    with pytest.raises(esft.InputError, match=r"^cannot resume with data e\.jsonl: the run was begun with another$"):
        folder.check_origin({"model": "1", "data": "3"}, {"model": "m", "data": "e.jsonl"})


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

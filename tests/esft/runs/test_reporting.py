import sys
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import esft
from esft.runs.reporting import WANDB, check_reporting, reporting


def test_tensorboard_forgets_what_is_of_later_steps_than_are_done(tmp_path):
    with reporting("tensorboard", tmp_path, 0, {}) as report:
        for step in (0, 1, 2, 3):
            report(step, {"lr": step / 4, "loss": 1.0})
    (events,) = (tmp_path / "tensorboard").iterdir()  # read in the order of their seconds, which a short test may share
    events.rename(events.with_name(events.name.replace(events.name.split(".")[3], "0000000001")))
    with reporting("tensorboard", tmp_path, 2, {}) as report:
        report(3, {"lr": 9.0})
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    found = [(event.step, event.value) for event in board.Scalars("lr")]
    assert found == [(0, 0.0), (1, 0.25), (2, 0.5), (3, 9.0)] and len(board.Scalars("loss")) == 3


def test_none_leaves_nothing(tmp_path):
    with reporting("none", tmp_path, 0, {}) as report:
        report(1, {"lr": 1.0})
    assert not list(tmp_path.iterdir())


@pytest.fixture
def wandb(monkeypatch):
    """In the place of the library: keeps what it is told."""
    told = SimpleNamespace(runs=[], lines=[], ended=0)

    class Run:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            told.ended += 1

        def log(self, values, step):
            told.lines.append((step, values))

    def init(**how):
        told.runs.append(how)
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    return told


def test_a_run_that_goes_on_is_the_same_in_wandb_and_one_that_begins_anew_is_another(tmp_path, wandb, monkeypatch):
    run = tmp_path / "run"
    run.mkdir()
    for done in (0, 2, 0):
        with reporting("wandb", run, done, {"lr": 0.5}) as report:
            report(done + 1, {"loss": 1.0 + done})
    ids = [each.pop("id") for each in wandb.runs]
    assert ids[0] == ids[1] != ids[2] == (run / WANDB).read_text()
    assert wandb.runs == [{"project": "esft", "name": "run", "resume": "allow", "config": {"lr": 0.5}}] * 3
    assert wandb.lines == [(1, {"loss": 1.0}), (3, {"loss": 3.0}), (1, {"loss": 1.0})] and wandb.ended == 3
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    with reporting("wandb", run, 0, {}):
        pass
    assert wandb.runs[-1]["project"] == "mine"


def test_what_wandb_refuses_is_one_error(tmp_path, monkeypatch):
    def init(**_):
        raise RuntimeError("no API key configured\nand more")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    with (
        pytest.raises(esft.InputError, match="^report_to wandb: no API key configured$"),
        reporting("wandb", tmp_path, 0, {}),
    ):
        pass


def test_without_the_library_it_is_told_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    check_reporting("tensorboard")
    check_reporting("none")
    with pytest.raises(
        esft.InputError, match=r"^report_to wandb needs the wandb package: pip install 'esft\[wandb\]'$"
    ):
        check_reporting("wandb")


def test_the_library_itself_takes_the_figures_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    with reporting("wandb", tmp_path, 0, {"lr": 0.5}) as report:
        report(0, {"eval_loss": 2.0})
        report(1, {"loss": 1.0})
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))

import json

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import esft
from esft.runs.metrics import logging, read_metrics

STEP = {"step": 1, "loss": 2.0, "lr": 0.1, "tokens_per_second": 3.0}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


def test_metrics_are_read_line_by_line(path):
    lines = [STEP, {"step": 1, "eval_loss": 4.0}, {"step": 2}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_metrics(path) == lines


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{", r"not JSON \(Expecting property name"),
        ("[]", "names no step"),
        ("{}", "names no step"),
        ('{"step": "2"}', "names no step"),
        ('{"step": 0}', "names no step"),
        ('{"step": true}', "names no step"),
        ('{"step": 1}', "step 1 comes after step 2"),
        ('{"step": 2, "loss": NaN}', "NaN is no JSON number"),
        ('{"step": 2, "lr": "1"}', "lr is '1', no number"),
        ('{"step": 2, "lr": null}', "lr is None, no number"),
        ('{"step": 2, "loss": true}', "loss is True, no number"),
        ('{"step": 2, "loss": 1.0}', "a loss without lr and tokens_per_second"),
        ('{"step": 2, "loss": 1.0, "lr": 1.0}', "a loss without lr and tokens_per_second"),
        ('{"step": 2, "loss": 1.0, "tokens_per_second": 1.0}', "a loss without lr and tokens_per_second"),
    ],
)
def test_a_bad_line_is_named(path, bad: str, message: str):
    path.write_text('{"step": 2}\n' + bad)
    with pytest.raises(esft.InputError, match=f"metrics.jsonl: line 2: {message}"):
        read_metrics(path)


def test_the_last_line_that_a_kill_has_torn_is_left_out_and_no_other(path):
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "lo')
    assert read_metrics(path, torn=True) == [{"step": 1}, {"step": 2}]
    for text in ('{"st\n{"step": 2}', '{"step": 1}\n{"st\n'):
        path.write_text(text)
        with pytest.raises(esft.InputError, match=r"line \d: not JSON"):
            read_metrics(path, torn=True)


def test_what_is_of_later_steps_than_are_done_is_forgotten(path, tmp_path):
    with logging(path, tmp_path / "board", 0) as log:
        for step in (1, 2, 3):
            log(step, lr=step / 4)
    (events,) = (tmp_path / "board").iterdir()  # read in the order of their seconds, which a short test may share
    events.rename(events.with_name(events.name.replace(events.name.split(".")[3], "0000000001")))
    with logging(path, tmp_path / "board", 2) as log:
        log(3, lr=9.0)
    assert read_metrics(path) == [{"step": 1, "lr": 0.25}, {"step": 2, "lr": 0.5}, {"step": 3, "lr": 9.0}]
    board = EventAccumulator(str(tmp_path / "board")).Reload()
    assert [(event.step, event.value) for event in board.Scalars("lr")] == [(1, 0.25), (2, 0.5), (3, 9.0)]


def test_a_disk_that_is_full_is_named_when_a_step_is_logged(path, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with logging(path, tmp_path / "board", 0) as log:
        monkeypatch.setattr("builtins.print", full)
        with pytest.raises(esft.DiskError, match=r"metrics\.jsonl: No space left on device$"):
            log(1, loss=1.0)


def test_a_step_is_in_the_file_as_soon_as_it_is_logged(path, tmp_path):
    with logging(path, tmp_path / "board", 0) as log:
        for step in (1, 2):
            log(step, lr=0.5)
            assert read_metrics(path)[-1] == {"step": step, "lr": 0.5}

import json

import pytest

import esft
from esft.runs import metrics
from esft.runs.metrics import evaluations, logging, read_metrics

STEP = {"step": 1, "loss": 2.0, "lr": 0.1, "tokens_per_second": 3.0}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


def test_metrics_are_read_line_by_line(path):
    lines = [STEP, {"step": 1, "eval_loss": 4.0}, {"step": 2}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_metrics(path) == lines


def test_an_evaluation_may_come_before_the_first_step_and_the_last_of_a_step_counts(path):
    lines = [{"step": 0, "eval_loss": 5.0}, STEP, {"step": 1, "eval_loss": 4.0}, {"step": 1, "eval_a_chrf": 1, "lr": 2}]
    path.write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"step": 1, "eval_loss": 3.0}]))
    assert evaluations(read_metrics(path)) == {0: {"eval_loss": 5.0}, 1: {"eval_loss": 3.0, "eval_a_chrf": 1}}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{", r"not JSON \(Expecting property name"),
        ("[]", "names no step"),
        ("{}", "names no step"),
        ('{"step": "2"}', "names no step"),
        ('{"step": 0}', "names no step"),
        ('{"step": 0, "loss": 1.0}', "names no step"),
        ('{"step": -1, "eval_loss": 1.0}', "names no step"),
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


def test_what_is_of_later_steps_than_are_done_is_forgotten(path):
    shown = []
    for first, done in ((1, 0), (3, 2)):
        with logging(path, done, lambda step, values: shown.append((step, values))) as log:
            for step in (first, *range(first + 1, 4)):
                log(step, lr=step / 4 + done)
    assert read_metrics(path) == [{"step": 1, "lr": 0.25}, {"step": 2, "lr": 0.5}, {"step": 3, "lr": 2.75}]
    assert shown == [(1, {"lr": 0.25}), (2, {"lr": 0.5}), (3, {"lr": 0.75}), (3, {"lr": 2.75})]


def test_a_line_that_a_kill_has_torn_goes_when_the_next_step_is_logged(path):
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    with logging(path, 1, lambda step, values: None) as log:
        log(2, lr=0.5)
    assert read_metrics(path) == [{"step": 1}, {"step": 2, "lr": 0.5}]


def test_a_disk_that_is_full_is_named_when_a_step_is_logged(path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with logging(path, 0, lambda step, values: None) as log:
        monkeypatch.setattr("builtins.print", full)
        with pytest.raises(esft.DiskError, match=r"metrics\.jsonl: No space left on device$"):
            log(1, loss=1.0)


def test_a_step_is_in_the_file_as_soon_as_it_is_logged(path):
    with logging(path, 0, lambda step, values: None) as log:
        for step in (1, 2):
            log(step, lr=0.5)
            assert read_metrics(path)[-1] == {"step": step, "lr": 0.5}


def test_figures_without_end_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "METRICS_BYTES", 3)
    (tmp_path / "metrics.jsonl").write_text("    ")
    with pytest.raises(esft.InputError, match=r"metrics\.jsonl: has 4 bytes; at most 3 are read$"):
        metrics.read_metrics(tmp_path / "metrics.jsonl")

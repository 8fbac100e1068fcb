"""What is measured while a model trains, and what follows of it."""

import json
import math
import os
import signal
from types import SimpleNamespace

import pytest

import esft
from esft.evaluation import scores
from esft.evaluation.scores import EvalSet, Measured
from esft.runs.checkpoints import Best
from esft.training import evaluations as module
from esft.training.evaluations import Evaluations, deciding, figures
from esft.training.steps import Steps
from tests.esft.models import write_records
from tests.esft.small_runs import breaks, column, metrics, run, settings


def test_figures_are_named_by_data_and_score_and_the_first_decides_unless_told():
    config = settings(eval_metrics="exact_match,loss")
    assert figures(config, [""]) == ["eval_exact_match", "eval_loss"]
    named = ["eval_a_exact_match", "eval_a_loss", "eval_b_exact_match", "eval_b_loss"]
    assert figures(config, ["a", "b"]) == named
    assert deciding(config, ["a", "b"]) == "eval_a_exact_match" and deciding(config, []) is None
    for given in ("b_loss", "eval_b_loss"):
        assert deciding(settings(eval_metrics="loss", metric_for_best_model=given), ["a", "b"]) == "eval_b_loss"
    with pytest.raises(esft.InputError, match="^metric_for_best_model loss is not measured; of eval_a_loss it can be"):
        deciding(settings(metric_for_best_model="loss"), ["a"])


@pytest.mark.parametrize(
    "needs", [{"load_best_model_at_end": True}, {"early_stopping_patience": 2}, {"metric_for_best_model": "loss"}]
)
def test_what_evaluation_data_decides_on_needs_some_before_anything_is_read(base, out, needs: dict):
    with pytest.raises(esft.InputError, match=rf"^{next(iter(needs))} needs evaluation data \(eval_data\)$"):
        esft.train("nowhere", base.parent / "none.jsonl", out, settings(method="full", **needs))
    assert not out.exists()


def watched(config, values, best=None) -> Evaluations:
    """Evaluations of which each has the next value; not with a model."""
    names, given = config.scores, iter(values)
    made = Evaluations(None, None, config, [EvalSet("", "e", [])], {}, best)
    made._measured = lambda step: dict.fromkeys((f"eval_{name}" for name in names), next(given))
    return made


@pytest.mark.parametrize(
    ("more", "values", "best", "stale"),
    [
        ({}, [3.0, 2.0, 2.0, 2.5], (2, 2.0), 2),  # no better is not better
        ({"greater_is_better": True}, [3.0, 2.0, 4.0], (3, 4.0), 0),
        ({"eval_metrics": "exact_match"}, [0.5, 0.25, 0.75, 0.5], (3, 0.75), 1),
        ({"eval_metrics": "exact_match", "greater_is_better": False}, [0.5, 0.25], (2, 0.25), 0),
        ({"early_stopping_threshold": 0.5}, [3.0, 2.75, 2.5, 1.5], (4, 1.5), 0),
        ({"early_stopping_threshold": 0.5}, [3.0, 2.75, 2.25], (3, 2.25), 2),  # each too little beside the one before
    ],
    ids=str,
)
def test_the_best_step_is_the_first_of_those_with_the_best_figure(more: dict, values: list, best: tuple, stale: int):
    made = watched(settings(**more), values)
    for step in range(1, len(values) + 1):
        made.after(step, lambda *_, **__: None)
    assert made.best == Best(*best, stale, len(values))


def test_patience_ends_after_so_many_evaluations_in_a_row_and_not_before():
    made = watched(settings(early_stopping_patience=2), [3.0, 4.0, 2.0, 2.5, 2.5])
    ends = []
    for step in range(1, 6):
        made.after(step, lambda *_, **__: None)
        ends.append(made.exhausted)
    assert ends == [False] * 4 + [True]
    made = watched(settings(), [1.0, 2.0, 3.0])
    for step in (1, 2, 3):
        made.after(step, lambda *_, **__: None)
    assert not made.exhausted


@pytest.mark.parametrize("kept", [True, False])
def test_the_model_of_the_best_step_is_kept_where_that_is_asked_for(kept: bool):
    made = watched(settings(load_best_model_at_end=kept), [3.0, 4.0])
    for step in (6, 12):
        made.after(step, lambda *_, **__: None)
        assert made.keeps(step) == (kept and step == 6)


def test_what_came_before_the_first_step_is_no_model_to_keep():
    made = watched(settings(), [1.0, 3.0])
    made.after(0, lambda *_, **__: None)
    assert made.best is None
    made.after(6, lambda *_, **__: None)
    assert made.best == Best(6, 3.0, 0, 6)


def test_an_evaluation_that_is_recorded_is_not_made_again_and_not_counted_twice():
    logged = []
    seen = Best(6, 1.0, 1, 12)
    made = Evaluations(None, None, settings(), [EvalSet("", "e", [])], {12: {"eval_loss": 2.0}, 6: {}}, seen)
    made._measured = lambda step: {"eval_loss": 9.0}
    made.after(12, lambda *given, **values: logged.append((given, values)))
    assert made.best == seen and not logged
    made.after(6, lambda *given, **values: logged.append((given, values)))  # recorded without its figure
    assert logged == [((6,), {"eval_loss": 9.0})] and made.best == seen


@pytest.mark.parametrize(
    ("step", "on_start", "due"),
    [(0, True, True), (0, False, False), (6, True, True), (7, True, False), (12, True, True), (13, True, True)],
)
def test_evaluations_are_due_at_the_start_now_and_then_and_at_the_end(step: int, on_start: bool, due: bool):
    config = settings(steps=13, eval_on_start=on_start)
    assert Evaluations(None, None, config, [EvalSet("", "e", [])], {}, None).due(step) is due
    assert not Evaluations(None, None, config, [], {}, None).due(step)


def test_every_set_is_measured_with_the_scores_and_the_batches_of_the_training(monkeypatch):
    asked, mode = [], []
    model = SimpleNamespace(train=lambda: mode.append("train"))

    def measure(*given):
        asked.append(given)
        return Measured({"loss": float(len(asked)), "chrf": 10.0 + len(asked)})

    monkeypatch.setattr(module, "measure", measure)
    sets = [EvalSet(name, name, []) for name in ("a", "b")]
    config = settings(eval_metrics="loss,chrf", micro_batch_size=4)
    made, logged = Evaluations(model, "tokenizer", config, sets, {}, None), []
    made.after(6, lambda step, **values: logged.append((step, values)))
    expected = {"eval_a_loss": 1.0, "eval_a_chrf": 11.0, "eval_b_loss": 2.0, "eval_b_chrf": 12.0}
    assert logged == [(6, expected)] and made.recorded == {6: expected} and mode == ["train"]
    assert asked == [(model, "tokenizer", each, ["loss", "chrf"], 4) for each in sets]


def test_a_loss_on_the_evaluation_data_that_is_not_finite_stops_the_run(base, out, fake, monkeypatch):
    monkeypatch.setattr(scores, "mean_loss", lambda *_: math.inf)
    with pytest.raises(esft.DivergenceError, match="step 6: loss inf on the evaluation data; lower the learning rate"):
        run(base, "run", settings())
    assert not (out / "summary.json").exists()
    named = {"task": base.parent / "d.jsonl"}
    message = "^before the first step: loss inf on the evaluation data task: the base's weights hold what is no number"
    with pytest.raises(esft.InputError, match=message):
        run(base, "other", settings(eval_on_start=True), eval_data=named)


def test_a_loss_that_is_no_number_stops_the_run_also_beside_a_score_that_is_one(monkeypatch):
    monkeypatch.setattr(module, "measure", lambda *_: Measured({"loss": math.inf, "chrf": 1.0}))
    made = Evaluations(None, None, settings(eval_metrics="loss,chrf"), [EvalSet("a", "a", [])], {}, None)
    with pytest.raises(esft.DivergenceError, match="^step 6: loss inf on the evaluation data a; lower the"):
        made.after(6, lambda *_, **__: None)


def test_a_signal_in_an_evaluation_stops_the_run_too(base, out, fake, monkeypatch):
    monkeypatch.setattr(scores, "mean_loss", lambda *_: os.kill(os.getpid(), signal.SIGTERM) or 0.25)
    with pytest.raises(esft.errors.Interrupted, match="stopped after step 7"):
        run(base, "run", settings())
    with pytest.raises(esft.errors.Interrupted, match="stopped after step 12"):
        run(base, "run", settings(), resume=True)
    assert column(out, "eval_loss") == [0.25, 0.25]
    result = run(base, "run", settings(), resume=True)
    assert column(out, "eval_loss") == [0.25, 0.25] and result.eval_loss == 0.25


BEST = {0: 9.0, 2: 5.0, 4: 3.0, 6: 4.0, 8: 3.5, 10: 2.0, 12: 1.0}


@pytest.fixture
def best(monkeypatch):
    """Losses on the evaluation data that the step alone decides on."""
    losses = dict(BEST)
    monkeypatch.setattr(Evaluations, "_measured", lambda self, step: {"eval_loss": losses[step]})
    return losses


@pytest.mark.parametrize("killed", [None, 0, 4, 5, 7])
def test_the_best_model_is_kept_and_patience_ends_the_run_alike_whenever_it_was_killed(
    base, out, best, monkeypatch, killed: int | None
):
    """Best after step 4, and no better after 6 and 8. The kill comes within the step after so many."""
    config = settings(
        eval_every=2, save_every=3, load_best_model_at_end=True, early_stopping_patience=2, eval_on_start=True,
        dtype="float32",
    )  # fmt: skip
    if killed is not None:
        real = Steps.update
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            count = breaks(killed + 1)
            patch.setattr(Steps, "update", lambda *given: count() or real(*given))
            run(base, "run", config)
    result = run(base, "run", config, resume=killed is not None)
    assert (result.steps, result.best_step) == (8, 4)
    assert (result.before, result.after, result.eval_loss) == ({"eval_loss": 9.0}, {"eval_loss": 3.0}, 3.0)
    assert [(line["step"], line["eval_loss"]) for line in metrics(out) if "eval_loss" in line] == list(BEST.items())[:5]
    assert len(column(out, "loss")) == 8
    run(base, "short", settings(steps=4, eval_every=99, dtype="float32"), eval_data=None)
    adapter = "adapter/adapter.safetensors"
    assert (out / adapter).read_bytes() == (base.parent / "short" / adapter).read_bytes()
    if killed is None:
        again = run(base, "run", None, None, resume=True)
        assert (again.steps, again.best_step, again.after) == (8, 4, {"eval_loss": 3.0})
        assert (out / adapter).read_bytes() == (base.parent / "short" / adapter).read_bytes()


def test_the_last_model_is_kept_unless_told_and_what_was_best_is_still_told(base, out, best):
    best[12] = 9.0
    result = run(base, "run", settings(eval_every=2, save_every=99))
    assert (result.steps, result.best_step, result.eval_loss) == (12, None, 9.0)
    assert not list((out / "checkpoints").glob("*"))  # nothing that only the best is kept for


@pytest.mark.parametrize("more", [{"load_best_model_at_end": True}, {"early_stopping_patience": 9}], ids=str)
def test_a_run_that_evaluation_data_decides_on_resumes_with_no_other(base, out, fake, more: dict):
    config = settings(steps=4, save_every=2, **more)
    run(base, "run", config)
    write_records(base.parent / "e.jsonl", 5)
    with pytest.raises(
        esft.InputError, match="^cannot resume with eval_data .*e.jsonl: the run was begun with another$"
    ):
        run(base, "run", None, None, resume=True, eval_data=base.parent / "e.jsonl")
    with pytest.raises(esft.InputError, match=f"^{next(iter(more))} needs evaluation data"):
        run(base, "run", None, None, resume=True, eval_data=None)
    run(base, "free", settings(steps=4, save_every=2))
    assert "eval_data" not in json.loads((base.parent / "free" / "origin.json").read_text())["digests"]
    run(base, "free", None, None, resume=True, eval_data=base.parent / "e.jsonl")


def test_scores_are_measured_before_and_after_on_every_set(base, out):
    """A task score, too; the base's random weights answer nothing right."""
    write_records(base.parent / "e.jsonl", 5)
    data = {"task": base.parent / "d.jsonl", "other": base.parent / "e.jsonl"}
    result = run(
        base,
        "run",
        settings(steps=2, eval_every=2, eval_on_start=True, eval_metrics="loss,exact_match"),
        eval_data=data,
    )
    names = ["eval_task_loss", "eval_task_exact_match", "eval_other_loss", "eval_other_exact_match"]
    assert list(result.before) == list(result.after) == names
    assert result.after["eval_task_loss"] < result.before["eval_task_loss"]
    assert result.before["eval_task_exact_match"] == 0.0 and result.eval_loss == result.after["eval_task_loss"]
    assert [line["step"] for line in metrics(out) if names[0] in line] == [0, 2]
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["before"], summary["after"]) == (result.before, result.after)

"""Which cells a comparison has, and that one which was stopped goes on."""

import json

import pytest

from benchmarks.methods import cell as cells
from benchmarks.methods import study
from benchmarks.methods.cell import METHODS, Cell
from benchmarks.methods.study import Study

TWO = Study(("a", "b"), ("base", "full"), (1, 2, 3), 5, {})


def known(study: Study, best: float) -> dict:
    return {cell: {"score": float(cell.rate == best)} for cell in study.trials()}


def test_every_method_that_trains_has_as_many_rates_to_try():
    assert {len(method.rates) for method in METHODS.values() if method.train} == {3}
    assert len(TWO.trials()) == 2 * 3
    assert {(cell.seed, cell.split, cell.steps) for cell in TWO.trials()} == {(0, "validation", 5)}


def test_the_best_rate_of_each_task_is_tested_with_every_seed():
    rate = METHODS["full"].rates[1]
    finals = TWO.finals(known(TWO, rate))
    assert [c for c in finals if c.method == "base"] == [Cell(task, "base", 0.0, 1, "test", 5) for task in "ab"]
    full = [c for c in finals if c.method == "full"]
    assert full == [Cell(task, "full", rate, seed, "test", 5) for task in "ab" for seed in (1, 2, 3)]


def test_a_method_whose_trials_are_not_all_measured_is_not_tested():
    some = dict(list(known(TWO, METHODS["full"].rates[0]).items())[:-1])
    assert {(c.task, c.method) for c in TWO.finals(some)} == {("a", "base"), ("b", "base"), ("a", "full")}


def test_what_is_measured_is_not_measured_again(tmp_path, monkeypatch, capsys):
    asked = []

    def measure(cell: Cell, folder):
        asked.append(cell)
        if len(asked) == 4:
            raise RuntimeError("stopped")
        study.write_json(folder / "cells" / f"{cell.name}.json", vars(cell) | {"score": cell.rate})

    monkeypatch.setattr(study, "_in_a_process", measure)
    monkeypatch.setattr(study.tasks, "files", lambda *_: None)
    monkeypatch.setattr(study.tasks, "general", lambda *_: None)
    with pytest.raises(RuntimeError, match="stopped"):
        study.measured(TWO, tmp_path, 1)
    found = study.measured(TWO, tmp_path, 1)
    assert len(asked) == len(set(asked)) + 1 == len(found) + 1
    assert {cell.rate for cell in found if cell.split == "test" and cell.method == "full"} == {METHODS["full"].rates[2]}
    assert capsys.readouterr().out.splitlines()[-1] == "8 of 8 cells"


def test_rules_choose_as_many_experts_as_the_papers(monkeypatch):
    import random

    import esft

    token = {layer: {expert: (expert + 1) / 36 for expert in range(8)} for layer in (1, 2)}
    scores = esft.ExpertScores(token, token)
    paper = cells.chosen()(scores, random.Random(0))
    counts = {layer: len(ids) for layer, ids in paper.experts.items()}
    drawn, least = cells.drawn(scores, random.Random(0)), cells.least(scores, random.Random(0))
    for other in (drawn, least):
        assert {layer: len(ids) for layer, ids in other.experts.items()} == counts and other.shared_experts
    assert least.experts[1] == list(range(counts[1])) and 7 in paper.experts[1]
    assert drawn == cells.drawn(scores, random.Random(0)) and drawn != cells.drawn(scores, random.Random(1))


@pytest.mark.slow
def test_the_smoke_study_measures_and_prints_all_tables(tmp_path, capsys):
    study.main(["--smoke", "--out", str(tmp_path), "--results", str(tmp_path / "results.json")])
    found = json.loads((tmp_path / "results.json").read_text())
    assert [(c["method"], c["split"]) for c in found].count(("esft-token, shared", "validation")) == 3
    assert [(c["method"], c["split"]) for c in found].count(("esft-token, shared", "test")) == 2
    assert capsys.readouterr().out.count("\n## ") == 3
    assert not list((tmp_path / "runs").iterdir())

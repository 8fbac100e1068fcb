"""Which cells a comparison has, and that one which was stopped goes on."""

import json
from dataclasses import replace
from pathlib import Path
from threading import Barrier

import pytest

from benchmarks.methods import study, tables
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

    def measure(folder, cell: Cell) -> dict:
        asked.append(cell)
        if len(asked) == 4:
            raise RuntimeError("stopped")
        study.write_json(study._file(folder, cell), found := vars(cell) | {"score": cell.rate})
        return found

    monkeypatch.setattr(study, "_in_a_process", measure)
    monkeypatch.setattr(study.tasks, "files", lambda *_: None)
    monkeypatch.setattr(study.tasks, "scores", lambda *_: None)
    monkeypatch.setattr(study.tasks, "general", lambda *_: None)
    with pytest.raises(RuntimeError, match="stopped"):
        study.measured(TWO, tmp_path, 1, tmp_path / "r.json")
    found = study.measured(TWO, tmp_path, 1, tmp_path / "r.json")
    assert len(asked) == len(set(asked)) + 1 == len(found) + 1
    assert {cell.rate for cell in found if cell.split == "test" and cell.method == "full"} == {METHODS["full"].rates[2]}
    assert [cell.task for cell in asked] == ["a"] * 4 + ["a"] * 4 + ["b"] * 7  # whole tables of some where it stops
    assert capsys.readouterr().out.splitlines()[-1].startswith("b-full-0.004-3-test-5: 0.4%; 0 ")
    assert study.found_in(tmp_path / "r.json") == found
    assert study.measured(TWO, tmp_path / "new", 1, tmp_path / "r.json") == found  # of another folder, by the results
    assert len(asked) == len(found) + 1


def test_as_many_cells_as_workers_are_measured_at_a_time(tmp_path, monkeypatch):
    together, meets = Barrier(3), []

    def measure(folder, cell: Cell) -> dict:
        if len(meets) < 3:  # the first of each worker wait for one another
            meets.append(cell)
            together.wait(timeout=30)
        return vars(cell) | {"score": cell.rate}

    monkeypatch.setattr(study, "_in_a_process", measure)
    for name in ("files", "scores", "general"):
        monkeypatch.setattr(study.tasks, name, lambda *_: None)
    assert len(study.measured(TWO, tmp_path, 3, tmp_path / "r.json")) == len(
        TWO.cells(known(TWO, METHODS["full"].rates[2]))
    )


@pytest.mark.parametrize("what", [["--tasks", "dates,nothing"], ["--methods", "full;nothing"]])
def test_what_there_is_not_is_named_before_anything_runs(tmp_path, capsys, what: list[str]):
    with pytest.raises(SystemExit):
        study.main([*what, "--out", str(tmp_path / "out")])
    assert "there is no 'nothing'" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_cell_that_fails_is_named_and_says_why(tmp_path, capfd):
    cell = Cell("nothing", "base", 0.0, 1, "test", 5)
    with pytest.raises(RuntimeError, match=f"^{cell.name}: ended with 1, see above$"):
        study._in_a_process(tmp_path, cell)
    assert "No such file or directory" in capfd.readouterr().err


@pytest.mark.slow
def test_the_smoke_study_measures_and_prints_all_tables(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(METHODS, name := "esft-token, shared", replace(METHODS[name], rates=(5e-3,)))
    parts = [{"part": "prose", "text": "A short text."}, {"part": "code", "text": "x = 1\n"}]
    (tmp_path / "smoke").mkdir()
    (tmp_path / "smoke" / "general.jsonl").write_text("".join(json.dumps(part) + "\n" for part in parts))
    study.main(["--smoke", "--out", str(tmp_path), "--results", str(tmp_path / "r.json")])
    found = json.loads((tmp_path / "r.json").read_text())
    assert [(c["method"], c["seed"]) for c in found] == [("base", 1), (name, 1), (name, 2)]
    assert all(c["general"].keys() == {"prose", "code"} and 0 <= c["score"] <= 1 for c in found)
    assert found[1]["trained_parameters"] > 0 and not list((tmp_path / "smoke" / "runs").iterdir())
    printed = capsys.readouterr().out
    assert printed.count("\n## ") == 5
    study.main(["--tables", "--steps", "2", "--results", str(tmp_path / "r.json")])
    assert printed.endswith(capsys.readouterr().out)


def test_tables_are_of_trainings_that_are_as_long_as_one_another(tmp_path, capsys):
    results, more = tmp_path / "r.json", {"general": {}, "parameters": 10}
    cells = [Cell("a", "base", 0.0, 1, "test", steps) for steps in (2, 3)]
    found = [vars(cell) | {"score": score} | more for cell, score in zip(cells, (0.25, 0.75), strict=True)]
    results.write_text(json.dumps(found))
    study.main(["--tables", "--steps", "2", "--results", str(results)])
    assert capsys.readouterr().out == tables.page(found[:1]) + "\n" != tables.page(found) + "\n"


def test_the_tables_of_the_docs_are_those_of_the_results():
    text = (Path(study.__file__).parents[2] / "docs" / "methods_tables.md").read_text(encoding="utf-8")
    assert text.endswith("\n\n" + tables.page(list(study.found_in(study.RESULTS).values())) + "\n")

import json

import pytest

import esft
from esft.reporting.comparison import comparison, read_runs, write_comparison_page
from esft.reporting.page import check_page
from esft.reporting.record import RunRecord
from esft.selection import ExpertSelection
from esft.storage.files import write_json
from tests.esft.reporting.pages import make_run, read_page


def rows(*runs) -> dict[str, list[str]]:
    table = comparison([RunRecord.read(run) for run in runs])
    return {row[""]: list(row.values())[1:] for row in table}


@pytest.fixture
def runs(tmp_path):
    other = make_run(tmp_path / "b", selection=ExpertSelection({1: [2], 3: [1, 0, 3]}), lr=1e-3, batch_size=8)
    return [make_run(tmp_path / "a"), other, make_run(tmp_path / "c", method="full", steps=2, ended=False)]


def test_runs_are_told_side_by_side(runs):
    assert rows(*runs) == {
        "method": ["esft", "esft", "full"],
        "steps done": ["4", "4", "2 (not ended)"],
        "experts": ["3", "4", ""],
        "lr": ["1e-05", "0.001", "3e-05"],
        "batch_size": ["32", "8", "32"],
        "train loss": ["1.25", "1.25", ""],
        "eval loss": ["1.5", "1.5", ""],
        "trained parameters": ["300", "300", ""],
        "stored bytes": ["600 bytes", "600 bytes", ""],
        "seconds": ["65.4", "65.4", ""],
        "tokens per second": ["100", "100", ""],
        "peak rss": ["2.5 GB", "2.5 GB", ""],
        "best eval loss": ["2.5 (step 4)", "2.5 (step 4)", "2.75 (step 2)"],
        "of a's experts": ["", "2 (66.7%)", ""],
        "of b's experts": ["2 (50.0%)", "", ""],
    }
    assert list(comparison([RunRecord.read(run) for run in runs])[0]) == ["", "a", "b", "c"]


def test_a_score_that_is_no_loss_is_best_where_it_is_highest(tmp_path):
    made = [make_run(tmp_path / name) for name in "ab"]
    for run, scores in zip(made, ([0.2, 0.6, 0.6], [0.9]), strict=True):
        with open(run / "metrics.jsonl", "a") as file:
            file.writelines(json.dumps({"step": 4 + i, "eval_exact_match": s}) + "\n" for i, s in enumerate(scores))
    assert rows(*made)["best eval exact match"] == ["0.6 (step 5)", "0.9 (step 4)"]


def test_a_setting_that_is_not_given_is_none(tmp_path):
    found = rows(make_run(tmp_path / "a"), make_run(tmp_path / "b", micro_batch_size=2))
    assert found["micro_batch_size"] == ["none", "2"]


def test_base_and_data_are_told_where_they_differ(tmp_path):
    made = [make_run(tmp_path / name) for name in "ab"]
    origin = json.loads((made[1] / "origin.json").read_text())
    write_json(made[1] / "origin.json", origin | {"model": "base2", "digests": origin["digests"] | {"model": "m2"}})
    found = rows(*made)
    assert found["model"] == ["base", "base2"] and "data" not in found
    assert found["of a's experts"] == ["", "another base"] and found["of b's experts"] == ["another base", ""]


@pytest.mark.parametrize(("name", "digest", "cell"), [("elsewhere", "1", "3 (100.0%)"), ("base", "m2", "another base")])
def test_a_base_is_another_by_its_weights_and_not_by_its_name(tmp_path, name: str, digest: str, cell: str):
    made = [make_run(tmp_path / run) for run in "ab"]
    for run, model, own in zip(made, ("base", name), ("1", digest), strict=True):
        origin = json.loads((run / "origin.json").read_text())
        write_json(run / "origin.json", origin | {"model": model, "digests": origin["digests"] | {"model": own}})
    assert rows(*made)["of a's experts"] == ["", cell] and ("model" in rows(*made)) == (digest != "1")


def test_runs_without_a_selection_have_no_overlap(tmp_path):
    found = rows(make_run(tmp_path / "a", method="full"), make_run(tmp_path / "b", method="lora"))
    assert "experts" not in found and not any("'s experts" in name for name in found)
    assert not any("'s experts" in name for name in rows(make_run(tmp_path / "c"), tmp_path / "b"))


def test_a_page_draws_all_of_them_in_one_chart_a_figure(runs, tmp_path):
    write_comparison_page(read_runs(runs), tmp_path / "p.html")
    check_page(tmp_path / "p.html")
    page = read_page(tmp_path / "p.html")
    assert page.one("h1").text == "3 runs side by side"
    told = [row for section in page.all("section")[:-1] for row in section.one("table").rows[1:]]
    assert told == [list(row.values()) for row in comparison(read_runs(runs))]
    curves = page.one("section", id="curves")
    assert [h3.text for h3 in curves.all("h3")] == ["loss", "lr", "tokens per second", "eval loss"]
    assert curves.all("table")[0].rows[:2] == [["steps", "a", "b", "c"], ["1", "3.5", "3.5", "3.5"]]
    assert all(f"{name}: " in curves.all("img")[0].attributes["alt"] for name in "abc")


def test_names_of_runs_are_text(tmp_path):
    made = [make_run(tmp_path / name) for name in ("<script>alert(1)<", "$x^{")]
    write_comparison_page(read_runs(made), tmp_path / "p.html")
    page = read_page(tmp_path / "p.html")
    assert page.one("section", id="part1").one("table").rows[0] == ["", "<script>alert(1)<", "$x^{"]


def test_runs_that_cannot_be_compared(runs, tmp_path):
    for given, said in (
        (runs[:1], "at least two"), ([runs[0], runs[1], tmp_path / "b" / ".." / "a"], "a: is named twice"),
        ([runs[0], tmp_path], "not the folder of a run that has begun"),
    ):  # fmt: skip
        with pytest.raises(esft.InputError, match=said):
            read_runs(given)

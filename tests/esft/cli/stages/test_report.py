"""What ``esft report`` hands over, prints and writes."""

import pytest

from esft.cli.parser import main
from esft.cli.stages import report
from tests.esft.cli.conftest import stage, usage, values
from tests.esft.reporting.pages import SCORES, make_run, read_page, write_evaluation


def test_report_hands_over_and_prints(work, calls, capsys):
    calls.watch("report", "a table")
    stage("report run")
    assert calls.of["report"] == [(("run",), {})]
    assert capsys.readouterr().out.splitlines() == ["a table"]


@pytest.fixture
def files(work):
    make_run(work / "run")
    make_run(work / "other")
    SCORES.save(work / "s.json")
    write_evaluation(work / "e.json", ("one", "1", "2"))
    return work


def test_a_page_has_what_every_option_names(files, capsys):
    stage(
        "report run --html p.html --with other --with run --scores s.json --scores-after s.json --eval-before e.json "
        "--eval-after e.json"
    )
    assert capsys.readouterr().out == "page of run in p.html\n"
    page = read_page(files / "p.html")
    assert [link.text for link in page.one("nav").all("a")] == [
        "What was chosen", "Other runs' choice", "Training", "Expert load", "Answers", "Sizes", "Settings", "Origin",
    ]  # fmt: skip
    assert [h3.text for h3 in page.one("section", id="overlap").all("h3")] == ["other", "run"]
    stage("report run --html q.html")
    assert len(read_page(files / "q.html").all("section")) == 5


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--scores s.json", "--scores goes onto a page: needs --html FILE"),
        ("--with other", "--with goes onto a page: needs --html FILE"),
        ("--eval-after e.json", "--eval-after goes onto a page: needs --html FILE"),
        ("--html s.json --scores s.json --overwrite", "would replace s.json, which is read"),
        ("--html e.json --eval-before e.json --overwrite", "would replace e.json, which is read"),
        ("--html run/p.html", "lies in run, which is read"),
        ("--html other/p.html --with other", "lies in other, which is read"),
        ("--html p.html", "p.html: exists already (--overwrite replaces it)"),
        ("--html s.json --overwrite", "s.json: holds something else, and is not overwritten (not a page that esft"),
        ("--html no/p.html", "no/p.html: no is not a folder"),
        ("--html q.html --with absent", "absent: not the folder of a run that has begun"),
        ("--html q.html --scores absent.json", "absent.json: No such file"),
    ],
)
def test_what_is_refused_leaves_every_file_as_it_was(files, capsys, options: str, said: str):
    (files / "p.html").write_text("something")
    before = {path: path.read_bytes() for path in files.rglob("*") if path.is_file()}
    assert main(["report", "run", *options.split()]) == 2
    assert said in capsys.readouterr().err
    assert {path: path.read_bytes() for path in files.rglob("*") if path.is_file()} == before


def test_a_page_of_ours_is_replaced_when_said_so(files):
    stage("report other --html p.html")
    stage("report run --html p.html --overwrite")
    assert read_page(files / "p.html").one("title").text == "Run run"


def test_report_is_called_like_this(monkeypatch):
    assert usage(monkeypatch, report) == (
        "[--html FILE] [--with RUN] [--scores FILE] [--scores-after FILE] [--eval-before FILE] [--eval-after FILE] "
        "[--overwrite] run"
    )
    assert values(monkeypatch, "report r") == {
        "run": "r", "html": None, "with": [], "scores": None, "scores_after": None, "eval_before": None,
        "eval_after": None, "overwrite": False,
    }  # fmt: skip

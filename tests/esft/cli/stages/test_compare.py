"""What ``esft compare`` prints and writes."""

import pytest

from esft.cli.parser import main
from esft.cli.stages import compare
from tests.esft.cli.conftest import stage, usage, values
from tests.esft.reporting.pages import make_run, read_page


@pytest.fixture
def runs(work):
    make_run(work / "one")
    make_run(work / "two", method="lora")
    return work


def test_compare_prints_a_table_and_writes_a_page(runs, capsys):
    stage("compare one two")
    table = capsys.readouterr().out
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert lines[0] == ["", "one", "two"] and lines[2] == ["method", "esft", "lora"]
    assert ["best eval loss", "2.5 (step 4)", "2.5 (step 4)"] in lines
    stage("compare one two --html p.html")
    assert capsys.readouterr().out == f"{table}\npage in p.html\n"
    assert read_page(runs / "p.html").one("title").text == "2 runs side by side"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("one", "at least two runs"),
        ("one absent", "absent: not the folder of a run that has begun"),
        ("one ./one", "one: is named twice"),
        ("one two --html two/p.html", "lies in two, which is read"),
        ("one two --html d.jsonl", "d.jsonl: exists already (--overwrite replaces it)"),
        ("one two --html d.jsonl --overwrite", "d.jsonl: holds something else, and is not overwritten"),
    ],
)
def test_what_is_refused_writes_nothing(runs, capsys, arguments: str, said: str):
    before = {path: path.read_bytes() for path in runs.rglob("*") if path.is_file()}
    assert main(["compare", *arguments.split()]) == 2
    printed = capsys.readouterr()
    assert said in printed.err and printed.out == ""
    assert {path: path.read_bytes() for path in runs.rglob("*") if path.is_file()} == before


def test_a_page_of_ours_is_replaced_when_said_so(runs):
    stage("report one --html p.html")
    stage("compare two one --html p.html --overwrite")
    assert read_page(runs / "p.html").one("title").text == "2 runs side by side"


def test_compare_is_called_like_this(monkeypatch):
    assert usage(monkeypatch, compare) == "[--html FILE] [--overwrite] RUN [RUN ...]"
    assert values(monkeypatch, "compare r s") == {"runs": ["r", "s"], "html": None, "overwrite": False}

"""What ``esft eval`` hands to the Python calls that it covers, and what it prints and writes."""

import json
import re

import pytest

from esft.cli.parser import main
from esft.cli.stages import eval as module
from esft.data.sources import read_records
from esft.errors import DiskError
from esft.evaluation.scores import Measured
from tests.esft.cli.conftest import MODEL, NO_COUNTS, OF_MODEL, refused, stage, usage, values
from tests.esft.models import write_records

ANSWER = {"prompt": "p", "expected": '{"a": 1}', "given": '{"a": 2}', "correct": False}


@pytest.fixture
def measured(work, calls):
    calls.watch("measure", Measured({"loss": 0.5, "exact_match": 0.25}, [ANSWER]))
    return calls


def test_eval_measures_the_first_records_and_writes_the_answers(work, measured, capsys):
    stage(
        "eval --model m --data d.jsonl --limit 4 --batch-size 3 --max-length 40 --dtype float32 --backend reference "
        "--out o.json"
    )
    result = {"records": 4, "loss": 0.5, "exact_match": 0.25}
    assert json.loads(capsys.readouterr().out) == result
    assert json.loads((work / "o.json").read_text()) == {**result, "answers": [ANSWER]}
    (((model, tokenizer, data, scores, batch_size, progress), _),) = measured.of["measure"]
    assert (model, tokenizer.pad_token_id, scores, batch_size, progress) == (
        "a model",
        258,
        ["loss", "exact_match"],
        3,
        True,
    )
    assert (data.name, data.source, len(data.examples)) == ("", "d.jsonl", 4)
    assert data.records == read_records("d.jsonl")[:4]
    assert measured.of["load_with_adapter"] == [(("m", None, "auto", "float32", "reference", False, True, "bf16"), {})]


def test_eval_can_leave_the_answers_out_and_keeps_a_file_that_is_there(work, measured, capsys):
    measured.answers["measure"] = Measured({"loss": 0.5})
    stage("eval --model m --data d.jsonl --loss-only --out o.json")
    assert json.loads(capsys.readouterr().out) == {"records": 6, "loss": 0.5}
    assert json.loads((work / "o.json").read_text())["answers"] == []
    assert measured.of["measure"][0][0][3] == ["loss"]
    assert main("eval --model m --data d.jsonl --loss-only --out o.json".split()) == 2
    assert "o.json: exists already" in capsys.readouterr().err and len(measured.of["load_with_adapter"]) == 1
    stage("eval --model m --data d.jsonl --quiet --out o.json --overwrite")
    assert measured.of["measure"][-1][0][-1] is False
    assert measured.of["load_with_adapter"][-1][0][-2:] == (False, "bf16")


def test_eval_keeps_what_it_measured_where_it_cannot_be_printed(work, measured, monkeypatch):
    def full(*_: str) -> None:
        raise DiskError("standard output: No space left on device")

    monkeypatch.setattr(module, "say", full)
    assert main("eval --model m --data d.jsonl --loss-only --out o.json".split()) == 2
    assert json.loads((work / "o.json").read_text())["loss"] == 0.5


def test_eval_measures_several_sets_in_one_call(work, measured, capsys):
    write_records(work / "g.jsonl", 2)
    for _ in range(2):  # its own outcome it may replace
        stage("eval --model m --data task=d.jsonl --data general=g.jsonl --out o.json --overwrite")
        figures = {"loss": 0.5, "exact_match": 0.25}
        expected = {"task": {"records": 6, **figures}, "general": {"records": 2, **figures}}
        assert json.loads(capsys.readouterr().out) == {"data": expected}
    answers = {name: each | {"answers": [ANSWER]} for name, each in expected.items()}
    assert json.loads((work / "o.json").read_text()) == {"data": answers}
    assert len(measured.of["load_with_adapter"]) == 2  # once a call


@pytest.mark.parametrize(
    "text",
    [
        '{"data": {"task": {"records": 1}}}', '{"data": {"task": 3}}', '{"data": 3}', '{"data": {}}', "{}", "[1]",
        '{"records": ["a quiz"], "answers": ["of somebody"]}', '{"records": 1, "answers": [], "notes": "mine"}',
        '{"data": {"task": {"records": 1, "answers": []}}, "notes": "mine"}',
    ],
)  # fmt: skip
def test_eval_replaces_nothing_but_an_outcome(work, measured, capsys, text: str):
    (work / "o.json").write_text(text)
    assert main("eval --model m --data d.jsonl --out o.json --overwrite".split()) == 2
    assert "o.json: holds something else, and is not overwritten (" in capsys.readouterr().err
    assert (work / "o.json").read_text() == text


def test_json_is_told_field_by_field(work, measured, capsys):
    measured.answers["measure"] = Measured({"json_match": 0.0}, [ANSWER])
    stage("eval --model m --data d.jsonl --metrics json_match")
    assert json.loads(capsys.readouterr().out) == {"records": 6, "json_match": 0.0, "json_fields": {"a": 0.0}}
    assert len(measured.of["measure"][0][0][2].examples) == 0  # tokens are for the loss


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--data d.jsonl --metrics loss,bleu", "--metrics must be of loss, exact_match, .*, with commas, got 'bleu'"),
        ("--data d.jsonl --data d.jsonl", "--data d.jsonl: of several, each needs a name: --data NAME=d.jsonl"),
        ("--data a=d.jsonl --data a=d.jsonl", "--data a=d.jsonl: two have the name a"),
        ("--data a=d.jsonl --data b=none.jsonl", "none.jsonl: No such file or directory"),
        ("--data a=d.jsonl --data b=empty.jsonl", "empty.jsonl: holds no records"),
        ("--data d.jsonl --metrics choices", "d.jsonl: line 1: has no choices .*"),
        ("--data d.jsonl --max-length 3", "d.jsonl: no record has its answer within 3 tokens"),
    ],
)
def test_bad_input_is_one_line_before_the_model_is_loaded(work, measured, capsys, more: str, message: str):
    (work / "empty.jsonl").write_text("")
    assert main(f"eval --model m {more}".split()) == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert re.fullmatch(f"esft: {message}", line) and "load_with_adapter" not in measured.of


def test_a_loss_that_is_no_number_is_an_error_and_no_json(work, calls, capsys):
    calls.watch("measure", Measured({"loss": float("nan")}))
    assert main("eval --model m --data d.jsonl --loss-only --out o.json".split()) == 2
    printed = capsys.readouterr()
    assert printed.err == "esft: m: loss on d.jsonl is nan: weights hold what is no number, or too much\n"
    assert printed.out == "" and not (work / "o.json").exists()


def test_eval_is_called_like_this(monkeypatch):
    assert usage(monkeypatch, module) == (
        f"{MODEL} [--batch-size RECORDS] [--adapter ADAPTER] --data DATA [--limit LIMIT] "
        "[--metrics METRICS | --loss-only] [--out OUT] [--overwrite]"
    )
    assert values(monkeypatch, "eval --model m --data d") == {
        **OF_MODEL, "batch_size": 64, "adapter": None, "data": ["d"], "limit": None, "metrics": "loss,exact_match",
        "out": None, "overwrite": False,
    }  # fmt: skip


@pytest.mark.parametrize("value", NO_COUNTS)
@pytest.mark.parametrize("option", ["--batch-size", "--max-length", "--limit"])
def test_a_number_that_is_none_is_refused_with_its_option(capsys, option: str, value: str):
    assert f"argument {option}: " in refused(capsys, f"eval --model m --data d {option} {value}")

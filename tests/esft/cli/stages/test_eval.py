"""What ``esft eval`` hands to the Python calls that it covers, and what it prints and writes."""

import json

import pytest

from esft.cli.parser import main
from esft.data.sources import read_records
from tests.esft.cli.conftest import stage


@pytest.fixture
def measured(work, calls):
    calls.watch("mean_loss", 0.5)
    calls.watch("exact_match", (0.25, [{"given": "a"}]))
    return calls


def test_eval_measures_the_first_records_and_writes_the_answers(work, measured, capsys):
    stage(
        "eval --model m --data d.jsonl --limit 4 --batch-size 3 --max-length 40 --dtype float32 --backend reference "
        "--out o.json"
    )
    result = {"records": 4, "loss": 0.5, "exact_match": 0.25}
    assert json.loads(capsys.readouterr().out) == result
    assert json.loads((work / "o.json").read_text()) == {**result, "answers": [{"given": "a"}]}
    (((model, examples, pad, batch_size), _),) = measured.of["mean_loss"]
    assert (model, len(examples), pad, batch_size) == ("a model", 4, 258, 3)
    (((model, _, records, batch_size, progress), _),) = measured.of["exact_match"]
    assert (model, records, batch_size, progress) == ("a model", read_records("d.jsonl")[:4], 3, True)
    assert measured.of["load_with_adapter"] == [(("m", None, "auto", "float32", "reference", False, True, "bf16"), {})]


def test_eval_can_leave_the_answers_out_and_keeps_a_file_that_is_there(work, measured, capsys):
    stage("eval --model m --data d.jsonl --loss-only --out o.json")
    assert json.loads(capsys.readouterr().out) == {"records": 6, "loss": 0.5}
    assert json.loads((work / "o.json").read_text())["answers"] == []
    assert "exact_match" not in measured.of
    assert main("eval --model m --data d.jsonl --loss-only --out o.json".split()) == 2
    assert "o.json: exists already" in capsys.readouterr().err and len(measured.of["load_with_adapter"]) == 1
    stage("eval --model m --data d.jsonl --quiet --out o.json --overwrite")
    assert measured.of["exact_match"][0][0][-1] is False
    assert measured.of["load_with_adapter"][-1][0][-2:] == (False, "bf16")


def test_eval_cuts_records_as_it_is_told(work, measured, capsys):
    assert main("eval --model m --data d.jsonl --max-length 3".split()) == 2
    assert "d.jsonl: no record has its answer within 3 tokens" in capsys.readouterr().err


def test_a_loss_that_is_no_number_is_an_error_and_no_json(work, calls, capsys):
    calls.watch("mean_loss", float("nan"))
    assert main("eval --model m --data d.jsonl --loss-only --out o.json".split()) == 2
    printed = capsys.readouterr()
    assert printed.err == "esft: m: loss on d.jsonl is nan: weights hold what is no number, or too much\n"
    assert printed.out == "" and not (work / "o.json").exists()

"""What ``esft score`` hands to the Python calls that it covers, and what it prints and writes."""

import pytest
import torch

import esft
from esft.cli.parser import main
from esft.cli.stages import score
from tests.esft.cli.conftest import MODEL, NO_COUNTS, OF_MODEL, refused, stage, usage, values
from tests.esft.models import save_tiny, tiny_model


def test_score_loads_the_model_and_scores_windows_of_the_data(work, calls, capsys):
    scores = esft.ExpertScores({1: {0: 1.0}, 2: {0: 1.0}}, {1: {0: 1.0}, 2: {0: 1.0}})
    calls.watch("score_experts", scores)
    calls.watch("windows", "batches")
    stage(
        "score --model m --data d.jsonl --out s.json --max-length 30 --batch-size 2 --max-tokens 77 --dtype float32 "
        "--backend reference --frozen nf4 --frozen-linear int8"
    )
    assert calls.of["load_with_adapter"] == [(("m", None, "nf4", "float32", "reference", False, True, "int8"), {})]
    assert calls.of["load_tokenizer"] == calls.of["open_config"] == [(("m", False), {})]
    (((examples, length, batch_size), _),) = calls.of["windows"]
    assert (len(examples), length, batch_size) == (6, 30, 2)
    assert calls.of["score_experts"] == [(("a model", "batches", 77, True, False), {})]
    assert esft.ExpertScores.load("s.json") == scores
    assert capsys.readouterr().out == "scores of 2 layers in s.json\n"


def test_score_keeps_a_file_that_is_there_and_replaces_it_where_it_is_told(work, calls, capsys):
    calls.watch("score_experts", esft.ExpertScores({1: {0: 1.0}}, {1: {0: 1.0}}))
    esft.ExpertScores({1: {0: 0.5, 1: 0.5}}, {1: {0: 0.5, 1: 0.5}}).save(work / "s.json")
    assert main("score --model m --data d.jsonl --out s.json".split()) == 2
    assert "s.json: exists already" in capsys.readouterr().err and "load_with_adapter" not in calls.of
    stage("score --model m --data d.jsonl --out s.json --overwrite")
    assert esft.ExpertScores.load("s.json").token_scores == {1: {0: 1.0}}


def test_scores_of_a_real_model_add_up(work):
    save_tiny(work / "base")
    stage("score --model base --data d.jsonl --out s.json --max-length 64")
    scores = esft.ExpertScores.load("s.json")
    assert list(scores.token_scores) == [1, 2]
    for layer in scores.token_scores.values():
        assert sum(layer.values()) == pytest.approx(1, abs=1e-3)
    assert torch.is_grad_enabled()


def test_outputs_and_gradients_are_scored_where_they_are_asked_for(work):
    save_tiny(work / "base")
    stage("score --model base --data d.jsonl --out s.json --max-length 64 --outputs --gradients --batch-size 3")
    scores = esft.ExpertScores.load("s.json")
    for rule in ("output", "fisher", "fisher_rows"):
        assert list(scores.by(rule)) == [1, 2] and max(scores.by(rule)[1].values()) > 0
        stage(f"select --scores s.json --by {rule} --budget 25% --out {rule}.json --model base")
        assert esft.ExpertSelection.load(f"{rule}.json").num_experts == 4
    assert torch.is_grad_enabled()


def test_gradients_are_of_batches_of_all_records_up_to_as_many_tokens(work, calls):
    each = {1: {0: 1.0}}
    calls.watch("score_experts", esft.ExpertScores(each, each))
    calls.watch("gradient_scores", (each, {1: {0: 0.5}}))
    stage("score --model m --data d.jsonl --out s.json --gradients --batch-size 4 --max-tokens 77 --quiet")
    (((model, batches, _, most, progress), named),) = calls.of["gradient_scores"]
    assert (model, most, progress, named) == ("a model", 77, False, {})
    assert sorted(len(batch["input_ids"]) for batch in batches) == [2, 4]
    found = esft.ExpertScores.load("s.json")
    assert (found.fisher_scores, found.fisher_rows_scores) == (each, {1: {0: 0.5}})


def test_a_warmed_up_model_is_scored_with_its_adapter(work):
    save_tiny(work / "base")
    tuned = esft.swap(tiny_model(), esft.ExpertSelection({1: list(range(8))}))
    with torch.no_grad():
        for experts in (m for m in tuned.modules() if hasattr(m, "trained_down_proj")):
            experts.trained_down_proj.mul_(20)
    esft.save_adapter(tuned, work / "a")
    stage("score --model base --data d.jsonl --out base.json --max-length 64")
    stage("score --model base --data d.jsonl --out tuned.json --max-length 64 --adapter a --gradients")
    base, warm = (esft.ExpertScores.load(f"{name}.json") for name in ("base", "tuned"))
    assert warm.token_scores[1] == base.token_scores[1]  # its router comes before what was tuned
    assert warm.token_scores[2] != base.token_scores[2]
    assert main("score --model base --data d.jsonl --out a/s.json --adapter a".split()) == 2


def test_score_is_called_like_this(monkeypatch):
    assert usage(monkeypatch, score) == (
        f"{MODEL} [--batch-size RECORDS] --data DATA --out OUT [--max-tokens MAX_TOKENS] [--outputs] [--gradients] "
        "[--adapter ADAPTER] [--overwrite]"
    )
    assert values(monkeypatch, "score --model m --data d --out o") == {
        **OF_MODEL, "data": "d", "out": "o", "batch_size": 1, "max_tokens": 131_072, "overwrite": False,
        "outputs": False, "gradients": False, "adapter": None,
    }  # fmt: skip


@pytest.mark.parametrize("value", NO_COUNTS)
@pytest.mark.parametrize("option", ["--max-tokens", "--batch-size", "--max-length"])
def test_a_number_that_is_none_is_refused_with_its_option(capsys, option: str, value: str):
    assert f"argument {option}: " in refused(capsys, f"score --model m --data d --out o {option} {value}")

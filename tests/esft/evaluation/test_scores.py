import math
import sys
from dataclasses import replace

import pytest

import esft
from esft.checkpoint.source import Reach
from esft.data.encoding import encode_all
from esft.data.records import Record
from esft.evaluation import scores as module
from esft.evaluation.loss import mean_loss
from esft.evaluation.scores import EvalSet, exact_match, measure
from tests.esft.models import (
    adds_a_start,
    chat,
    conversation,
    record,
    record_generate,
    tiny_encoder,
    tiny_model,
    tiny_tokenizer,
)


def test_exact_match_counts_the_outcomes(monkeypatch):
    monkeypatch.setattr("esft.evaluation.scores.answer", lambda *_: ["yes", "no", " yes", "[1]"])
    last = Record(chat("", "yes")[1:])
    records = [record("a", "yes"), record("b", "yes"), Record([*chat("c", "d"), *chat("e", "yes")]), last]
    share, outcomes = exact_match(tiny_model(), tiny_tokenizer(), records)
    assert share == 0.5
    assert outcomes == [
        {"prompt": "a", "expected": "yes", "given": "yes", "correct": True},
        {"prompt": "b", "expected": "yes", "given": "no", "correct": False},
        {"prompt": "e", "expected": "yes", "given": " yes", "correct": True},
        {"prompt": "", "expected": "yes", "given": "[1]", "correct": False},
    ]


def test_exact_match_leaves_room_for_two_tokens_more_than_the_longest_answer(monkeypatch):
    """An answer that runs on after the right text is wrong, and has to be seen to run on."""
    asked = []

    def runs_on(model, tokenizer, prompts, max_new_tokens, batch_size, progress):
        asked.append((prompts, max_new_tokens, batch_size, progress))
        return ["yes yes yes"[:max_new_tokens]] * len(prompts)  # one token a byte

    monkeypatch.setattr("esft.evaluation.scores.answer", runs_on)
    records = [record("a", "no"), record("b", "yes"), record("c", "")]
    share, outcomes = exact_match(tiny_model(), adds_a_start(tiny_tokenizer()), records, 2, True)
    assert (share, [o["given"] for o in outcomes]) == (0.0, ["yes y"] * 3)
    assert asked == [([conversation(p) for p in "abc"], 3 + 2, 2, True)]


def test_64_prompts_are_answered_at_a_time_and_progress_is_shown_when_wanted_only(capsys):
    model = tiny_model()
    calls = record_generate(model)
    exact_match(model, tiny_tokenizer(), [record("a", "a")] * 70)
    assert [len(call["input_ids"]) for call in calls] == [64, 6]
    assert capsys.readouterr().err == ""
    exact_match(model, tiny_tokenizer(), [record("a", "a")], progress=True)
    assert "generate: 100%" in capsys.readouterr().err


def test_of_a_text_with_a_prompt_the_rest_is_expected():
    model = tiny_model()
    record_generate(model)
    _, outcomes = exact_match(model, tiny_tokenizer(), [Record(text="abc", prompt=2)])
    assert [(each["prompt"], each["expected"]) for each in outcomes] == [("ab", "c")]


RECORDS = [record("a", "yes"), record("b", "no")]


def eval_set(records=RECORDS) -> EvalSet:
    return EvalSet("", "e.jsonl", encode_all(tiny_encoder(), records, "e.jsonl"), records)


def test_what_is_asked_for_is_measured_and_told_in_that_order(monkeypatch):
    monkeypatch.setattr(module, "answer", lambda *_: ["yes", "nope"])
    monkeypatch.setattr(module, "choose", lambda *_: ["no", "no"])
    model = tiny_model()
    found = measure(model, tiny_tokenizer(), eval_set(), ["json_match", "choices", "loss", "exact_match"])
    loss = mean_loss(model, eval_set().examples, 258)
    assert list(found.scores.items()) == [("json_match", 0.5), ("choices", 0.5), ("loss", loss), ("exact_match", 0.5)]
    assert found.answers == [
        {"prompt": "a", "expected": "yes", "given": "yes", "correct": True, "chosen": "no"},
        {"prompt": "b", "expected": "no", "given": "nope", "correct": False, "chosen": "no"},
    ]
    found = measure(model, tiny_tokenizer(), eval_set(), ["choices"])
    assert found.scores == {"choices": 0.5} and found.answers[0] == {"prompt": "a", "expected": "yes", "chosen": "no"}


def test_of_the_loss_alone_no_answer_is_made_and_of_no_number_neither(monkeypatch):
    monkeypatch.setattr(module, "answer", lambda *_: 1 / 0)
    found = measure(tiny_model(), tiny_tokenizer(), eval_set())
    assert list(found.scores) == ["loss"] and found.answers == []
    monkeypatch.setattr(module, "mean_loss", lambda *_: math.nan)
    assert math.isnan(measure(tiny_model(), tiny_tokenizer(), eval_set(), ["loss", "exact_match"]).scores["loss"])


def test_as_many_rows_as_are_asked_for_go_through_the_model_together(monkeypatch):
    asked = []
    monkeypatch.setattr(module, "mean_loss", lambda *given: asked.append(given[1:]) or 1.0)
    data = eval_set()
    for batch_size in ({}, {"batch_size": 3}):
        measure(tiny_model(), tiny_tokenizer(), data, **batch_size)
    assert asked == [(data.examples, 258, 32), (data.examples, 258, 3)]


def test_a_score_whose_library_is_missing_is_told_before_the_records_are_looked_at(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    with pytest.raises(esft.InputError, match="^chrf needs the sacrebleu package"):
        eval_set([Record(text="abc")]).check(tiny_tokenizer(), Reach(30, 300), ["loss", "chrf"])


def test_what_cannot_be_measured_is_named_with_its_source_before_it_is_tried():
    reach, tokenizer, text = Reach(30, 300), tiny_tokenizer(), Record(text="abc", place="line 3")
    EvalSet("", "e.jsonl", (), [text]).check(tokenizer, reach, ["loss"])
    EvalSet("", "e.jsonl", (), [replace(RECORDS[0], choices=["yes", "no"])]).check(tokenizer, reach, ["choices"])
    for records, scores, message in (
        ([text], ["loss", "exact_match"], "line 3: is a text without a prompt, which has no answer to compare"),
        ([RECORDS[0], record("a" * 30, "b")], ["chrf"], "prompt 2: has 34 tokens, and the model 30 positions"),
        ([replace(RECORDS[0], place="line 1")], ["choices"], "line 1: has no choices .*"),
        (
            [replace(RECORDS[0], choices=["a", "b"])],
            ["choices"],
            "a record: the expected answer is none of the choices",
        ),
        (
            [replace(record("a", "b" * 40), choices=["b" * 40, "c"], place="line 2")],
            ["choices"],
            "line 2: a choice reaches the model's 30 positions",
        ),
    ):
        if scores == ["chrf"]:
            pytest.importorskip("sacrebleu")
        with pytest.raises(esft.InputError, match=f"^e.jsonl: {message}$"):
            EvalSet("", "e.jsonl", (), records).check(tokenizer, reach, scores)

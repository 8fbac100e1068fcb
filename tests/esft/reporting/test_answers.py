import json

import pytest

import esft
from esft.cli.parser import main
from esft.reporting.answers import Answer, Evaluation, changes
from tests.esft.models import chat, save_tiny
from tests.esft.reporting.pages import write_evaluation


def evaluation(*rights: bool) -> Evaluation:
    return Evaluation({}, [Answer(str(i), "e", "e" if right else f"g{i}", right) for i, right in enumerate(rights)])


def test_an_evaluation_is_read(tmp_path):
    found = Evaluation.load(write_evaluation(tmp_path / "e.json", ("p", "e", "g"), ("q", "f", "f"), loss=2.5))
    assert found.figures == {"records": 2, "loss": 2.5, "exact_match": 0.5}
    assert found.answers == [Answer("p", "e", "g", False), Answer("q", "f", "f", True)]


@pytest.mark.parametrize(
    ("metrics", "kept"),
    [("loss,exact_match,json_match", 3), ("exact_match", 3), ("loss", 0), ("choices", 0), ("choices,exact_match", 3)],
)
def test_what_esft_eval_writes_is_read_whatever_was_measured(tmp_path, monkeypatch, metrics: str, kept: int):
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "base")
    lines = [{"messages": chat(f"say {c}", c), "choices": ["a", "b", "c"]} for c in "abc"]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(f"eval --model base --data d.jsonl --metrics {metrics} --out e.json --quiet".split()) == 0
    found = Evaluation.load("e.json")
    assert len(found.answers) == kept and found.figures.keys() == {"records", *metrics.split(",")}
    assert main("eval --model base --data a=d.jsonl --data b=d.jsonl --metrics loss --out s.json --quiet".split()) == 0
    with pytest.raises(esft.InputError, match=r"^s\.json: of several sets; a page takes the outcome of one$"):
        Evaluation.load("s.json")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([], "not an outcome of esft eval"),
        ({"records": 1, "loss": 1.0}, "not an outcome of esft eval"),
        ({"records": 1, "loss": 1.0, "answers": {}}, r"answers must be a list, got \{\}"),
        ({"records": 1, "loss": "x", "answers": []}, "loss is 'x', no number"),
        ({"records": 10**400, "loss": 1.0, "answers": []}, "records is 1000.*, no number"),
        ({"records": True, "loss": 1.0, "answers": []}, "records is True, no number"),
        ({"records": 1, "loss": 1.0, "answers": [1]}, "answer 1: must have texts prompt, expected, given, got 1"),
        ({"records": 3, "answers": [{"chosen": "a"}, {"chosen": "b"}, 1]}, "answer 3: must have texts"),
        (
            {"records": 1, "loss": 1, "answers": [{"prompt": "p", "expected": "e", "given": 3, "correct": True}]},
            "answer 1: must have texts",
        ),
        (
            {"records": 1, "loss": 1, "answers": [{"prompt": "p", "expected": "e", "given": "g", "correct": 1}]},
            "answer 1: correct must be true or false, got 1",
        ),
    ],
)
def test_what_is_no_evaluation_is_refused_with_its_place(tmp_path, content, said: str):
    (tmp_path / "e.json").write_text(json.dumps(content))
    with pytest.raises(esft.InputError, match=rf"e\.json: {said}"):
        Evaluation.load(tmp_path / "e.json")


def test_records_are_sorted_by_what_became_of_their_answers():
    kinds = changes(evaluation(False, True, False, True, False), evaluation(True, False, False, True, True))
    assert [(kind, [change.after.prompt for change in found]) for kind, found in kinds.items()] == [
        ("right now", ["0", "4"]), ("wrong now", ["1"]), ("still wrong", ["2"]), ("right before and after", ["3"]),
    ]  # fmt: skip
    first = kinds["right now"][0]
    assert (first.before.given, first.after.given, first.asked) == ("g0", "e", first.after)


def test_of_one_evaluation_there_are_right_and_wrong_answers():
    for before, after in ((evaluation(True, False), None), (None, evaluation(True, False))):
        kinds = changes(before, after)
        assert [(kind, [change.asked.prompt for change in found]) for kind, found in kinds.items()] == [
            ("wrong", ["1"]), ("right", ["0"]),
        ]  # fmt: skip
        assert (kinds["wrong"][0].before is None) == (before is None)


def test_kinds_without_a_record_are_left_out_and_losses_alone_have_none():
    assert list(changes(evaluation(True), evaluation(True))) == ["right before and after"]
    assert changes(None, None) == changes(evaluation(), None) == {}
    assert list(changes(evaluation(), evaluation(False))) == ["wrong"]


def test_evaluations_of_other_records_cannot_be_compared():
    for other in (evaluation(True), Evaluation({}, [Answer("0", "e", "e", True), Answer("1", "f", "f", True)])):
        with pytest.raises(esft.InputError, match="not of the same records"):
            changes(evaluation(True, True), other)

import pytest

from esft.data.records import Record
from esft.evaluation.scores import exact_match, matches
from tests.esft.models import adds_a_start, chat, conversation, record, record_generate, tiny_model, tiny_tokenizer


@pytest.mark.parametrize(
    ("given", "expected", "right"),
    [
        ('{"b": 1, "a": [2]}', '{"a":[2],"b":1}', True),
        ('{"a": 1', '{"a": 1}', False),
        ('{"a": "1"}', '{"a": 1}', False),
        ('{"a": 1, "b": 2}', '{"a": 1}', False),
        ("[1,  2]", "[1,2]", True),
        ("[2, 1]", "[1, 2]", False),
        ("[1, 2", "[1, 2]", False),
        ("1, 2", "[1, 2]", False),
        (" K AE T \n", "K AE T", True),
        ("K AE T", " K AE T \n", True),
        ("K A E T", "K AE T", False),
        ("k ae t", "K AE T", False),
        ("5.0", "5", False),
        ('"five"', '"five"', True),
        ("five", '"five"', False),
        ("null", "None", False),
    ],
)
def test_json_is_compared_by_value_and_text_by_letter(given: str, expected: str, right: bool):
    assert matches(given, expected) == right


@pytest.mark.parametrize("given", ["[" * 100_000, "[" + "9" * 5000 + "]"])
def test_an_answer_that_cannot_be_read_is_wrong(given: str):
    assert not matches(given, "[1]")


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

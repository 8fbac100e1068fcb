import sys

import pytest

import esft
from esft.evaluation.text_scores import (
    TEXT_SCORES,
    check_libraries,
    chrf,
    exact_share,
    field_matches,
    field_share,
    matches,
    rouge_l,
    share_by_field,
)


@pytest.mark.parametrize(
    ("given", "expected", "right"),
    [
        ('{"b": 1, "a": [2]}', '{"a":[2],"b":1}', True),
        ('{"a": 1', '{"a": 1}', False),
        ('{"a": "1"}', '{"a": 1}', False),
        ('{"a": 1, "b": 2}', '{"a": 1}', False),
        ('{"a": 1}', '{"a": true}', False),
        ('{"a": [false]}', '{"a": [0]}', False),
        ('{"a": 1.0}', '{"a": 1}', True),
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


@pytest.mark.parametrize(
    ("given", "expected", "fields"),
    [
        ('{"a": 1, "b": {"c": 2}}', '{"a": 1, "b": {"c": 3}}', {"a": True, "b.c": False}),
        ('{"a": 1, "x": 0}', '{"a": 1, "b": 2}', {"a": True, "b": False, "x": False}),
        ('{"a": [1, 5, 3]}', '{"a": [1, 2]}', {"a.0": True, "a.1": False, "a.2": False}),
        ('{"a": {}}', '{"a": {}}', {"a": True}),
        ('{"a": []}', '{"a": {}}', {"a": False}),
        ('{"a": null}', '{"b": null}', {"a": False, "b": False}),
        ('{"a": 1, "b": false}', '{"a": true, "b": false}', {"a": False, "b": True}),
        ('{"a.b": 1, "a": {"b": 2}}', '{"a.b": 1, "a": {"b": 3}}', {"a\\.b": True, "a.b": False}),
        ("no JSON", '{"a": 1}', {"": False, "a": False}),
        ("[]", "[]", {"": True}),
        ("yes", " yes", {"": True}),
        ('{"a": 1}', "yes", {"": False}),
    ],
)
def test_fields_are_right_where_both_have_them_and_alike(given: str, expected: str, fields: dict):
    assert field_matches(given, expected) == fields


def test_what_is_nested_deeply_is_compared_all_the_same():
    deep = '{"a": ' * 800 + "1" + "}" * 800
    assert list(field_matches(deep, deep).values()) == [True]
    assert not any(field_matches("[" * 100_000, deep).values())


def test_shares_are_means_over_answers_and_by_field_over_those_that_have_it():
    pairs = [('{"a": 1, "b": 2}', '{"a": 1, "b": 3}'), ('{"a": 1}', '{"a": 1}'), ("x", '{"a": 1}')]
    assert exact_share(pairs) == pytest.approx(1 / 3)
    assert field_share(pairs) == pytest.approx((1 / 2 + 1 + 0) / 3)
    assert list(share_by_field(pairs).items()) == [("", 0.0), ("a", pytest.approx(2 / 3)), ("b", 0.0)]


def test_chrf_is_that_of_the_corpus():
    sacrebleu = pytest.importorskip("sacrebleu")
    pairs = [("the cat sat", "the cat sits"), ("a dog", "a dog")]
    assert chrf(pairs) == pytest.approx(sacrebleu.corpus_chrf([a for a, _ in pairs], [[b for _, b in pairs]]).score)
    assert chrf([("same text", "same text")]) == pytest.approx(100) and chrf(pairs) < 100


def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence():
    pytest.importorskip("rouge_score")
    # "the cat" of three and four words: recall 2/4, precision 2/3.
    assert rouge_l([("the cat sat", "the black cat sits")]) == pytest.approx(2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4))
    assert rouge_l([("a b", "a b"), ("c", "d")]) == 0.5


@pytest.mark.parametrize(("score", "package"), [("chrf", "sacrebleu"), ("rouge_l", "rouge-score")])
def test_a_score_whose_library_is_missing_says_what_to_install(monkeypatch, score: str, package: str):
    for name in ("sacrebleu.metrics", "rouge_score.rouge_scorer"):
        monkeypatch.setitem(sys.modules, name, None)
    check_libraries(set(TEXT_SCORES) - {"chrf", "rouge_l"} | {"loss", "choices"})
    with pytest.raises(esft.InputError, match=rf"^{score} needs the {package} package: pip install 'esft\[eval\]'$"):
        check_libraries(["loss", score])

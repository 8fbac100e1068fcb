import json
import re

import pytest

import esft
from tests.esft.models import tiny_model, token_batch


def test_score_files_have_the_published_layout_and_round_trip(tmp_path):
    scores = esft.score_experts(tiny_model(), [token_batch()])
    scores.save(tmp_path / "s.json")
    raw = json.loads((tmp_path / "s.json").read_text())
    assert list(raw) == ["token_scores", "gate_scores"]
    assert raw["token_scores"]["2"]["7"] == scores.token_scores[2][7]
    assert raw["gate_scores"]["2"]["7"] == scores.gate_scores[2][7]
    assert esft.ExpertScores.load(tmp_path / "s.json") == scores


def test_loaded_scores_are_in_ascending_order(tmp_path):
    raw = {"10": {"9": 0.5, "11": 0, "1": 0.5}, "9": {"0": 1}}
    (tmp_path / "s.json").write_text(json.dumps({"token_scores": raw, "gate_scores": {"2": {"1": 0.1, "0": 0.2}}}))
    scores = esft.ExpertScores.load(tmp_path / "s.json")
    assert list(scores.token_scores) == [9, 10]
    assert list(scores.token_scores[10].items()) == [(1, 0.5), (9, 0.5), (11, 0.0)]
    assert list(scores.gate_scores[2].items()) == [(0, 0.2), (1, 0.1)]
    assert all(type(s) is float for experts in scores.token_scores.values() for s in experts.values())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "not a score file"),
        ('{"token_scores": {"a": {}}, "gate_scores": {}}', "not a score file"),
        ('{"token_scores": {"1": {"0": 1}}}', "not a score file"),
        ('{"gate_scores": {"1": {"0": 1}}}', "not a score file"),
        ('{"token_scores": {"1": {"0": "much"}}, "gate_scores": {}}', "not a score file"),
        ('{"token_scores": {"1": {"0": null}}, "gate_scores": {}}', "not a score file"),
        ('{"token_scores": {"1": [1.0]}, "gate_scores": {}}', "not a score file"),
        ('{"token_scores": {"1": {"0": 1%s}}, "gate_scores": {}}' % ("0" * 400), "not a score file"),
        ('{"token_scores": {"1": {"0": 1}, "3": {"2": -0.1}}, "gate_scores": {}}', "layer 3: expert 2 has score -0.1"),
        ('{"token_scores": {"1": {"0": NaN}}, "gate_scores": {}}', "layer 1: expert 0 has score nan"),
        ('{"token_scores": {}, "gate_scores": {"1": {"0": 0, "4": Infinity}}}', "layer 1: expert 4 has score inf"),
    ],
)
def test_a_file_that_holds_no_scores_is_refused_by_name(tmp_path, text: str, message: str):
    (tmp_path / "s.json").write_text(text)
    with pytest.raises(esft.InputError, match=f"s.json: .*{message}"):
        esft.ExpertScores.load(tmp_path / "s.json")


def test_scores_of_another_model_are_refused():
    scores = esft.score_experts(tiny_model(), [token_batch()])
    scores.check({1: 8, 2: 8})
    esft.ExpertScores(scores.token_scores, {}).check({1: 8, 2: 8})
    for layers, theirs in (({1: 8, 2: 8, 3: 6}, "layers 1-3 with [6, 8]"), ({1: 8, 2: 9}, "layers 1-2 with [8, 9]")):
        message = f"score file is of another model: it has layers 1-2 with [8] experts, the model has {theirs} experts"
        with pytest.raises(esft.InputError, match=re.escape(message)):
            scores.check(layers)
    with pytest.raises(esft.InputError, match="it has no layers, the model has layers 1-1 with"):
        esft.ExpertScores({}, {}).check({1: 8})
    with pytest.raises(esft.InputError, match=r"it has layers 1-1 with \[8\] experts, the model has layers 1-2"):
        esft.ExpertScores(scores.token_scores, {1: scores.gate_scores[1]}).check({1: 8, 2: 8})


@pytest.mark.parametrize("wrong", ["token_scores", "gate_scores"])
def test_scores_of_experts_that_the_model_does_not_have_are_refused(wrong: str):
    right, strange = {1: dict.fromkeys(range(4), 0.25)}, {1: dict.fromkeys((0, 1, 9, 4), 0.25)}
    scores = {"token_scores": right, "gate_scores": right} | {wrong: strange}
    with pytest.raises(esft.InputError, match="score file is of another model: layer 1 has no expert 4"):
        esft.ExpertScores(**scores).check({1: 4})

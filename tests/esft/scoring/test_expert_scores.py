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
    raw = {"10": {"1": 0.5, "2": 0, "0": 0.5}, "9": {"0": 1}}
    (tmp_path / "s.json").write_text(
        json.dumps({"token_scores": raw, "gate_scores": {"10": {"1": 7, "2": 2, "0": 0.2}}})
    )
    scores = esft.ExpertScores.load(tmp_path / "s.json")
    assert list(scores.token_scores) == [9, 10]
    assert list(scores.token_scores[10].items()) == [(0, 0.5), (1, 0.5), (2, 0.0)]
    assert list(scores.gate_scores[10].items()) == [(0, 0.2), (1, 7.0), (2, 2.0)]
    assert all(type(s) is float for experts in scores.token_scores.values() for s in experts.values())


@pytest.mark.parametrize(
    ("count", "off", "good"), [(64, 3.1e-3, True), (64, 3.3e-3, False), (4, 1.9e-4, True), (4, 3e-4, False)]
)
def test_a_layers_token_scores_sum_to_one_but_for_their_four_decimals(tmp_path, count: int, off: float, good: bool):
    for sign in (1, -1):
        layer = {str(e): (1 + sign * off) / count for e in range(count)}
        (tmp_path / "s.json").write_text(json.dumps({"token_scores": {"3": layer}, "gate_scores": {}}))
        if good:
            esft.ExpertScores.load(tmp_path / "s.json")
            continue
        with pytest.raises(esft.InputError, match=r"s\.json: token_scores of layer 3 sum to \d\.\d{4}, not to 1$"):
            esft.ExpertScores.load(tmp_path / "s.json")


def file(token: str, gate: str = "{}") -> str:
    return f'{{"token_scores": {token}, "gate_scores": {gate}}}'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "line 1: not JSON"),
        ("[]", "not a score file"),
        ('{"token_scores": {"1": {"0": 1}}}', "not a score file"),
        ('{"gate_scores": {"1": {"0": 1}}}', "not a score file"),
        (
            '{"token_scores": {}, "gate_scores": {}, "gate_score": {}}',
            r"part 'gate_score' \(is 'gate_scores' meant\?\)",
        ),
        (file("[]"), "token_scores must be {layer: {expert: score}}, got \\[\\]"),
        (file('{"a": {"0": 1}}'), "token_scores: 'a' is not a layer's number"),
        (file('{"01": {"0": 1}}'), "token_scores: '01' is not a layer's number"),
        (file('{"10000": {"0": 1}}'), "token_scores: '10000' is not a layer's number"),
        (file('{"1": {"x": 1}}'), "layer 1: 'x' is not an expert's number"),
        (file('{"1": {"-1": 1}}'), "layer 1: '-1' is not an expert's number"),
        (file('{"1": {"0": 0.5, "2": 0.5}}'), "layer 1 has no score of expert 1, but of expert 2"),
        (file('{"1": {}}'), "layer 1 must be {expert: score}, got {}"),
        (file('{"1": [1.0]}'), r"layer 1 must be {expert: score}, got \[1.0\]"),
        (file('{"1": {"0": "much"}}'), "layer 1: expert 0 has score 'much'"),
        (file('{"1": {"0": null}}'), "layer 1: expert 0 has score None"),
        (file('{"1": {"0": true}}'), "layer 1: expert 0 has score True"),
        (file('{"1": {"0": 1%s}}' % ("0" * 400)), "layer 1: expert 0 has score 1000"),
        (file('{"3": {"0": 1.1, "1": -0.1}}'), "layer 3: expert 1 has score -0.1"),
        (file('{"1": {"0": NaN}}'), "NaN is no JSON number"),
        (file('{"1": {"0": 1}, "1": {"0": 1}}'), "has the key '1' twice"),
        (file('{"1": {"0": 2.5, "1": 2.5}}'), "token_scores of layer 1 sum to 5.0000, not to 1"),
        (file('{"1": {"0": 0, "1": 0}}'), "token_scores of layer 1 sum to 0.0000, not to 1"),
        (file('{"1": {"0": 1}}', '{"2": {"0": 1}}'), "layer 2 has gate_scores of other experts than token_scores"),
        (file('{"1": {"0": 1}}', '{"1": {"0": 1, "1": 0}}'), "layer 1 has gate_scores of other experts"),
        (file('{"1": {"0": 1}}', '{"1": {"0": 1e7}}'), "gate_scores: layer 1: expert 0 has score 10000000.0"),
    ],
    ids=range(26),
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


ADDED = esft.ExpertScores(
    {1: {0: 0.5, 1: 0.5}}, {}, output_scores={1: {0: 1e9, 1: 0.0}}, fisher_rows_scores={1: {0: 1e-20, 1: 3.0}}
)


def test_further_scores_are_further_parts_of_the_file(tmp_path):
    ADDED.save(tmp_path / "s.json")
    raw = json.loads((tmp_path / "s.json").read_text())
    assert list(raw) == ["token_scores", "gate_scores", "output_scores", "fisher_rows_scores"]
    assert raw["output_scores"] == {"1": {"0": 1e9, "1": 0.0}}
    assert esft.ExpertScores.load(tmp_path / "s.json") == ADDED
    ADDED.check({1: 2})


def test_scores_are_found_by_their_rule():
    assert ADDED.by("token") == ADDED.token_scores and ADDED.by("fisher_rows") == ADDED.fisher_rows_scores
    for rule in ("gate", "fisher"):
        with pytest.raises(esft.InputError, match=f"^there are no {rule} scores to select by$"):
            ADDED.by(rule)


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ('{"2": {"0": 1}}', "layer 2 has fisher_scores of other experts than token_scores"),
        ('{"1": {"0": 1}}', "layer 1 has fisher_scores of other experts than token_scores"),
        ('{"1": {"0": 1, "1": 1e31}}', "fisher_scores: layer 1: expert 1 has score 1e\\+31"),
        ('{"1": {"0": 1, "1": -1}}', "fisher_scores: layer 1: expert 1 has score -1"),
        ("[]", "fisher_scores must be"),
    ],
)
def test_further_scores_are_read_as_strictly(tmp_path, added: str, message: str):
    text = f'{{"token_scores": {{"1": {{"0": 0.5, "1": 0.5}}}}, "gate_scores": {{}}, "fisher_scores": {added}}}'
    (tmp_path / "s.json").write_text(text)
    with pytest.raises(esft.InputError, match=f"s.json: .*{message}"):
        esft.ExpertScores.load(tmp_path / "s.json")

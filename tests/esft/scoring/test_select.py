import inspect
import re
from pathlib import Path

import pytest

import esft
from esft.scoring.expert_scores import ExpertScores
from esft.selection import ExpertSelection

OFFICIAL = Path(__file__).resolve().parents[4] / "shared" / "esft-official"


def scores_of(*values: float) -> ExpertScores:
    layer = {1: dict(enumerate(values))}
    return ExpertScores(layer, layer)


@pytest.mark.parametrize("task", ["intent", "translation"])
def test_published_selections_come_out_of_the_published_scores(task: str):
    if not OFFICIAL.is_dir():
        pytest.skip("the published score files are not at hand")
    scores = ExpertScores.load(OFFICIAL / task / "summary.json")
    expected = ExpertSelection.load(OFFICIAL / task / "expert_cfg.json")
    assert esft.select_experts(scores, by="token", top_p=0.2) == ExpertSelection(
        {layer: expected.experts[layer] for layer in scores.token_scores}
    )
    assert expected.experts.keys() == scores.token_scores.keys()


def test_highest_first_until_the_sum_reaches_top_p():
    chosen = esft.select_experts(scores_of(0.1, 0.4, 0.2, 0.3), top_p=0.7)
    assert chosen.experts == {1: [1, 3]}


def test_ties_go_to_the_lower_id_in_whatever_order_the_scores_come():
    assert esft.select_experts(scores_of(0.25, 0.25, 0.25, 0.25), top_p=0.5).experts == {1: [0, 1]}
    layer = {1: {3: 0.25, 1: 0.25, 2: 0.125, 0: 0.375}}
    assert esft.select_experts(ExpertScores(layer, {}), top_p=0.75).experts == {1: [0, 1, 3]}


def test_top_p_of_one_takes_every_expert_that_was_used():
    assert esft.select_experts(scores_of(0.3, 0.3, 0.4), top_p=1.0).experts == {1: [2, 0, 1]}
    assert esft.select_experts(scores_of(0.25, 0.0, 0.75), top_p=1.0).experts == {1: [2, 0]}  # none that was not


def test_every_layer_is_chosen_for_by_itself_and_the_choice_is_remembered():
    # All numbers are exact in binary, so that sums are too.
    tokens, gates = {4: {0: 0.25, 1: 0.75}, 2: {0: 1.0, 1: 0.0}}, {4: {0: 0.5, 1: 0.25}, 2: {0: 0.125, 1: 0.5}}
    scores = ExpertScores(tokens, gates)
    by_token = esft.select_experts(scores, "token", 1.0)
    assert by_token == ExpertSelection({4: [1, 0], 2: [0]})
    assert by_token.chosen_by == {"by": "token", "top_p": 1.0}
    by_gate = esft.select_experts(scores, "gate", 0.5)
    assert by_gate == ExpertSelection({4: [0], 2: [1]})
    assert by_gate.chosen_by == {"by": "gate", "top_p": 0.5}
    assert not (by_gate.shared_experts or by_gate.non_expert_modules)


def test_the_papers_choice_is_the_default():
    scores = ExpertScores({1: {0: 0.15, 1: 0.05, 2: 0.7, 3: 0.1}}, {1: {0: 1.0, 1: 0.0, 2: 0.0, 3: 0.0}})
    assert esft.select_experts(scores).chosen_by == {"by": "token", "top_p": 0.2}
    assert esft.select_experts(scores).experts == {1: [2]}
    assert [inspect.signature(esft.select_experts).parameters[n].default for n in ("by", "top_p")] == ["token", 0.2]


@pytest.mark.parametrize("top_p", [0.0, -0.1, 1.01, float("nan")])
def test_top_p_outside_its_range_is_refused(top_p: float):
    with pytest.raises(esft.InputError, match=re.escape(f"top_p must be in (0, 1], got {top_p}")):
        esft.select_experts(scores_of(1.0), top_p=top_p)


@pytest.mark.parametrize("total", [0.9999, 0.995, 0.99])
def test_scores_that_miss_top_p_by_no_more_than_published_sums_do_are_all_taken(total: float):
    chosen = esft.select_experts(scores_of(total - 0.25, 0.25), top_p=1.0)
    assert chosen.experts == {1: [0, 1]}


@pytest.mark.parametrize("total", [0.985, 0.9])
def test_scores_that_miss_top_p_by_more_are_refused(total: float):
    with pytest.raises(esft.InputError, match=rf"layer 1: token scores sum to {total:.3f}, below top_p 1.0"):
        esft.select_experts(scores_of(total - 0.25, 0.25), top_p=1.0)


def test_a_top_p_that_gate_scores_cannot_reach_is_refused_with_the_layer():
    scores = ExpertScores({}, {1: {0: 0.5, 1: 0.25}, 3: {0: 0.1, 1: 0.2}})
    with pytest.raises(esft.InputError, match="^layer 3: gate scores sum to 0.300, below top_p 0.5"):
        esft.select_experts(scores, by="gate", top_p=0.5)


@pytest.mark.parametrize("by", ["token", "gate"])
def test_scores_that_are_not_there_are_refused(by: str):
    scores = {"token": {1: {0: 1.0}}, "gate": {1: {0: 1.0}}} | {by: {}}
    with pytest.raises(esft.InputError, match=f"there are no {by} scores"):
        esft.select_experts(ExpertScores(scores["token"], scores["gate"]), by=by)


def test_an_unknown_score_is_refused():
    with pytest.raises(esft.InputError, match="by must be 'token' or 'gate', got 'rank'"):
        esft.select_experts(scores_of(1.0), by="rank")


def test_a_layer_without_the_scores_to_select_by_is_named():
    scores = ExpertScores({1: {0: 1.0}, 2: {0: 1.0}}, {1: {0: 0.5}})
    with pytest.raises(esft.InputError, match="^layer 2 has no gate scores to select by$"):
        esft.select_experts(scores, by="gate", top_p=0.1)

import dataclasses

import pytest

import esft
from esft.reporting import experts
from esft.reporting.experts import LayerOverlap, check_alike, check_scores, explained, heatmap, loads, overlap
from esft.scoring.select import select_experts
from esft.selection import ExpertSelection
from tests.esft.reporting.pages import AFTER, SCORES, SELECTION


def test_a_heatmap_has_every_expert_of_a_layer_by_falling_score():
    rows = heatmap(SCORES.token_scores, SELECTION)
    assert [(c.expert, c.score, c.rank, c.chosen) for c in rows[1]] == [
        (2, 0.5, 1, True), (0, 0.3, 2, True), (1, 0.2, 3, False), (3, 0.0, 4, False),
    ]  # fmt: skip
    assert [c.level for c in rows[3]] == [15, 2, 2, 2] and [c.level for c in rows[1]] == [11, 6, 4, 0]
    assert [c.expert for c in rows[3]] == [1, 0, 2, 3]  # of equal scores the lower number first
    assert [c.expert for c in heatmap({1: {2: 0.5, 0: 0.5, 1: 0.25}}, None)[1]] == [0, 2, 1]
    assert not any(cell.chosen for row in heatmap(SCORES.token_scores, None).values() for cell in row)


def test_a_heatmap_of_too_many_has_the_best_of_each_layer(monkeypatch):
    monkeypatch.setattr(experts, "MOST_CELLS", 5)
    assert [[c.expert for c in row] for row in heatmap(SCORES.token_scores, None).values()] == [[2, 0], [1, 0]]
    monkeypatch.setattr(experts, "MOST_CELLS", 1)
    assert [[c.expert for c in row] for row in heatmap(SCORES.token_scores, None).values()] == [[2], [1]]


def test_a_heatmap_of_nothing_but_zeros_and_one_of_nothing():
    assert [c.level for c in heatmap({1: {0: 0.0, 1: 0.0}}, None)[1]] == [0, 0]
    assert heatmap({}, None) == {}


def test_loads_tell_the_share_of_rows_on_the_chosen_and_what_moved():
    one, three = loads(SELECTION, SCORES, AFTER)
    assert (one.layer, one.chosen, one.experts) == (1, [2, 0], 4)
    assert (one.before, one.after) == pytest.approx((0.8, 0.7))
    assert one.drift == pytest.approx(0.2)
    assert one.gained == (3, pytest.approx(0.2)) and one.lost[1] == pytest.approx(-0.1)
    assert (three.before, three.after, three.drift) == pytest.approx((0.7, 0.8, 0.1))
    assert three.gained[0] == 1 and three.lost[0] == 0


def test_loads_of_one_kind_of_scores_or_none_have_no_drift():
    for before, after in ((SCORES, None), (None, AFTER), (None, None)):
        for load in loads(SELECTION, before, after):
            assert load.drift is load.gained is load.lost is None
            assert (load.before is None, load.after is None) == (before is None, after is None)
            assert load.experts == (4 if before or after else None)


TOP_P = "--by token --top-p P, for P above 0.5 and up to 0.7"


def test_the_shares_that_give_a_selection_are_told_exactly():
    assert explained(SELECTION, SCORES) == [TOP_P, "--by token --budget 3"]
    for p, same in ((0.5, False), (0.5 + 1e-9, True), (0.7, True), (0.7 + 1e-9, False)):
        assert (select_experts(SCORES, "token", p).experts == SELECTION.experts) == same


def test_every_rule_that_gives_a_selection_is_told():
    assert explained(ExpertSelection({1: [1], 3: [1]}), SCORES) == [
        "--by gate --top-p P, for P above 0 and up to 0.2", "--by gate --experts-per-layer 1", "--by gate --budget 2",
    ]  # fmt: skip
    assert explained(ExpertSelection({3: [1]}), SCORES)[1] == "--by token --layers 3: --experts-per-layer 1"
    assert explained(ExpertSelection({1: [], 3: [1]}), SCORES) == ["--by token --budget 1"]
    fisher = {1: {0: 6.0, 1: 2.0, 2: 1.0, 3: 1.0}, 3: {0: 0.0, 1: 0.0, 2: 0.0, 3: 5.0}}
    scores = dataclasses.replace(SCORES, fisher_scores=fisher)
    assert explained(ExpertSelection({1: [0, 1], 3: [3]}), scores) == [
        "--by fisher --top-p P, for P above 0.6 and up to 0.8", "--by fisher --budget 3",
    ]  # fmt: skip


@pytest.mark.parametrize("p", [0.05, 0.3, 0.5, 0.77, 0.9, 1.0])
def test_what_the_rule_has_chosen_is_told_to_be_of_the_rule(p: float):
    layer = dict.fromkeys(range(10), 0.1)  # sums of tenths round in every order otherwise
    scores = esft.ExpertScores({0: layer, 1: {0: 0.7, 1: 0.2, 2: 0.1}}, {})
    assert explained(select_experts(scores, "token", p), scores)[0].startswith("--by token --top-p P, for P above ")


@pytest.mark.parametrize("chosen", [{1: [0, 2], 3: [1]}, {1: [0], 3: [1]}, {3: [0, 1]}, {1: [2], 3: [1, 0, 2]}, {}])
def test_no_rule_gives_another_order_or_other_experts(chosen: dict[int, list[int]]):
    assert explained(ExpertSelection(chosen), SCORES) == []


def test_overlap_counts_what_both_have_and_what_chance_would_give():
    other = ExpertSelection({3: [0, 1, 2], 5: [7]})
    assert overlap(SELECTION, other, SCORES) == [
        LayerOverlap(1, 2, 0, 0, 0.0), LayerOverlap(3, 1, 3, 1, 0.75), LayerOverlap(5, 0, 1, 0, None),
    ]  # fmt: skip
    assert [layer.chance for layer in overlap(SELECTION, other)] == [None] * 3
    assert [each.layer for each in overlap(ExpertSelection({10: [1]}), ExpertSelection({3: [1]}))] == [3, 10]


def test_scores_of_another_model_are_refused():
    check_scores(SELECTION, SCORES, "s.json")
    check_scores(None, SCORES, "s.json")
    for chosen, named in (({1: [4]}, "expert 4 of layer 1"), ({2: []}, "layer 2")):
        with pytest.raises(esft.InputError, match=rf"^s\.json: scores of another model: has no {named}$"):
            check_scores(ExpertSelection(chosen), SCORES, "s.json")


def test_scores_before_and_after_are_of_the_same_model():
    check_alike(SCORES, AFTER, "t.json")
    for layers in ({1: AFTER.token_scores[1]}, AFTER.token_scores | {3: {0: 1.0}}, AFTER.token_scores | {4: {0: 1.0}}):
        with pytest.raises(esft.InputError, match=r"^t\.json: scores of another model than those before: layer [34] "):
            check_alike(SCORES, esft.ExpertScores(layers, {}), "t.json")


def test_scores_that_only_some_layers_have_explain_nothing():
    assert (
        explained(ExpertSelection({1: [1]}), dataclasses.replace(SCORES, gate_scores={1: SCORES.gate_scores[1]})) == []
    )

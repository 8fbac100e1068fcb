import pytest

import esft
from esft.reporting import experts
from esft.reporting.experts import LayerOverlap, check_scores, heatmap, loads, overlap, top_p_of
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


def test_the_top_p_that_gives_a_selection_is_told_exactly():
    above, most = top_p_of(SELECTION, SCORES, "token")
    assert (above, most) == pytest.approx((0.5, 0.7))
    for p, same in ((above, False), (above + 1e-9, True), (most, True), (most + 1e-9, False)):
        assert (select_experts(SCORES, "token", p).experts == SELECTION.experts) == same
    assert top_p_of(SELECTION, SCORES, "gate") is None
    assert top_p_of(ExpertSelection({1: [1], 3: [1]}), SCORES, "gate") == pytest.approx((0.0, 0.2))


@pytest.mark.parametrize("p", [0.05, 0.3, 0.5, 0.77, 0.9, 1.0])
def test_what_the_rule_has_chosen_is_told_to_be_of_the_rule(p: float):
    layer = dict.fromkeys(range(10), 0.1)  # sums of tenths round in every order otherwise
    scores = esft.ExpertScores({0: layer, 1: {0: 0.7, 1: 0.2, 2: 0.1}}, {})
    above, most = top_p_of(select_experts(scores, "token", p), scores, "token")
    assert above < p <= most + 1e-12
    assert above < most


@pytest.mark.parametrize(
    "chosen", [{1: [0, 2], 3: [1]}, {1: [2, 1], 3: [1]}, {1: [2, 0]}, {1: [2, 0], 3: []}, {}, {1: [2], 3: [1, 0, 2]}]
)
def test_no_top_p_gives_another_order_other_experts_or_other_layers(chosen: dict[int, list[int]]):
    assert top_p_of(ExpertSelection(chosen), SCORES, "token") is None


def test_without_gate_scores_they_explain_nothing():
    assert top_p_of(SELECTION, AFTER, "gate") is None


def test_overlap_counts_what_both_have_and_what_chance_would_give():
    other = ExpertSelection({3: [0, 1, 2], 5: [7]})
    assert overlap(SELECTION, other, SCORES) == [
        LayerOverlap(1, 2, 0, 0, 0.0), LayerOverlap(3, 1, 3, 1, 0.75), LayerOverlap(5, 0, 1, 0, None),
    ]  # fmt: skip
    assert [layer.chance for layer in overlap(SELECTION, other)] == [None] * 3


def test_scores_of_another_model_are_refused():
    check_scores(SELECTION, SCORES, "s.json")
    check_scores(None, SCORES, "s.json")
    for chosen, named in (({1: [4]}, "expert 4 of layer 1"), ({2: [0]}, "expert 0 of layer 2")):
        with pytest.raises(esft.InputError, match=rf"^s\.json: scores of another model: has no {named}$"):
            check_scores(ExpertSelection(chosen), SCORES, "s.json")

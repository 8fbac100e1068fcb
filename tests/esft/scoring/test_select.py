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
    with pytest.raises(
        esft.InputError, match="by must be one of 'token', 'gate', 'output', 'fisher', 'fisher_rows', got 'rank'"
    ):
        esft.select_experts(scores_of(1.0), by="rank")


def test_a_layer_without_the_scores_to_select_by_is_named():
    scores = ExpertScores({1: {0: 1.0}, 2: {0: 1.0}}, {1: {0: 0.5}})
    with pytest.raises(esft.InputError, match="^layer 2 has no gate scores to select by$"):
        esft.select_experts(scores, by="gate", top_p=0.1)


# Two layers; every number is exact in binary, so that sums are too.
TASK = ExpertScores(
    {1: {0: 0.5, 1: 0.25, 2: 0.25, 3: 0.0}, 4: {0: 0.125, 1: 0.0, 2: 0.75, 3: 0.125}},
    {},
    output_scores={1: {0: 2.0, 1: 4.0, 2: 1.0, 3: 1.0}, 4: {0: 64.0, 1: 0.0, 2: 32.0, 3: 32.0}},
)
GENERAL = ExpertScores({1: {0: 1.0, 1: 0.0, 2: 0.0, 3: 0.0}, 4: {0: 0.0, 1: 0.5, 2: 0.25, 3: 0.25}}, {})


def test_a_number_per_layer_takes_the_highest_of_each():
    chosen = esft.select_experts(TASK, experts_per_layer=2)
    assert chosen.experts == {1: [0, 1], 4: [2, 0]}
    assert chosen.chosen_by == {"by": "token", "experts_per_layer": 2}
    assert esft.select_experts(TASK, experts_per_layer=4).experts == {1: [0, 1, 2, 3], 4: [2, 0, 3, 1]}


def test_a_budget_goes_to_the_highest_of_all_layers_with_ties_to_the_lower_layer_and_id():
    assert esft.select_experts(TASK, budget=1).experts == {1: [], 4: [2]}
    assert esft.select_experts(TASK, budget=3).experts == {1: [0, 1], 4: [2]}
    chosen = esft.select_experts(TASK, budget=5)
    assert chosen.experts == {1: [0, 1, 2], 4: [2, 0]}
    assert chosen.chosen_by == {"by": "token", "budget": 5}
    assert esft.select_experts(TASK, by="output", budget=4).experts == {1: [1], 4: [0, 2, 3]}  # compared as they are


@pytest.mark.parametrize(("share", "count"), [(1.0, 8), (0.5, 4), (0.3, 2), (0.01, 1)])
def test_a_budget_may_be_a_share_of_all_experts_of_all_scored_layers(share: float, count: int):
    assert esft.select_experts(TASK, budget=share).num_experts == count
    assert esft.select_experts(TASK, budget=share).chosen_by["budget"] == count
    if count <= 4:
        assert esft.select_experts(TASK, budget=share, first_layer=2).num_experts == count


def test_a_choice_may_be_as_large_in_every_layer_as_another_one():
    other = ExpertSelection({4: [1, 3, 0], 1: [3]})
    chosen = esft.select_experts(TASK, by="output", like=other)
    assert chosen.experts == {1: [1], 4: [0, 2, 3]}
    assert chosen.chosen_by == {"by": "output", "like": {4: 3, 1: 1}}
    assert esft.select_experts(TASK, like=ExpertSelection({4: [1]})).experts == {1: [], 4: [2]}
    without = ExpertSelection({1: [], 4: [1]})  # names a layer that is not chosen from, and nothing of it
    assert esft.select_experts(TASK, like=without, first_layer=4).experts == {4: [2]}


def test_top_p_of_scores_with_a_unit_counts_shares_of_a_layers_sum():
    assert esft.select_experts(TASK, by="output", top_p=0.5).experts == {1: [1], 4: [0]}
    assert esft.select_experts(TASK, by="output", top_p=0.75).experts == {1: [1, 0], 4: [0, 2]}


def test_layers_below_the_first_one_have_no_part_in_a_choice():
    chosen = esft.select_experts(TASK, top_p=0.75, first_layer=2)
    assert chosen.experts == {4: [2]}
    assert chosen.chosen_by == {"by": "token", "top_p": 0.75, "first_layer": 2}
    assert esft.select_experts(TASK, budget=3, first_layer=4).experts == {4: [2, 0, 3]}
    assert esft.select_experts(TASK, top_p=0.75, first_layer=1) == esft.select_experts(TASK, top_p=0.75)


def test_general_use_is_taken_off_the_tasks_by_shares():
    # Layer 1: -0.5, 0.25, 0.25, 0; layer 4: 0.125, -0.5, 0.5, -0.125.
    chosen = esft.select_experts(TASK, budget=5, against=GENERAL)
    assert chosen.experts == {1: [1, 2], 4: [2, 0, 3]}
    assert chosen.chosen_by == {"by": "token", "budget": 5, "against": 1.0}
    # Layer 1: 0.25, 0.25, 0.25.
    assert esft.select_experts(TASK, experts_per_layer=1, against=GENERAL, weight=0.25).experts == {1: [0], 4: [2]}
    assert esft.select_experts(TASK, budget=5, against=GENERAL, weight=0).experts == {1: [0, 1, 2], 4: [2, 0]}


def test_general_use_of_layers_below_the_first_one_is_passed_over():
    chosen = esft.select_experts(TASK, experts_per_layer=1, against=GENERAL, first_layer=4)
    assert chosen.experts == {4: [2]}


def test_top_p_against_general_use_sums_the_tasks_scores_and_comes_last_to_what_the_task_does_not_use():
    assert esft.select_experts(TASK, top_p=0.5, against=GENERAL).experts == {1: [1, 2], 4: [2]}
    # Expert 3 of layer 1 has 0 less 0, expert 0 has 0.5 less 1.
    assert esft.select_experts(TASK, top_p=1.0, against=GENERAL).experts == {1: [1, 2, 0], 4: [2, 0, 3]}
    assert esft.select_experts(TASK, experts_per_layer=4, against=GENERAL).experts[1] == [1, 2, 0, 3]


def test_a_contrast_of_scores_with_a_unit_is_of_shares_too():
    general = ExpertScores({}, {}, output_scores={1: {0: 1.0, 1: 6.0, 2: 1.0, 3: 0.0}, 4: dict.fromkeys(range(4), 0.0)})
    ordered = esft.select_experts(TASK, by="output", experts_per_layer=4, against=general)
    # Layer 1: 0.25 - 0.125, 0.5 - 0.75, 0.125 - 0.125, 0.125; of general text that was not seen, nothing.
    assert ordered.experts == {1: [0, 3, 2, 1], 4: [0, 2, 3, 1]}


DEEPER = ExpertScores({**GENERAL.token_scores, 5: {0: 1.0}}, {})
OTHER = ExpertScores({1: {0: 0.5, 1: 0.5}, 4: TASK.token_scores[4]}, {})


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"experts_per_layer": 0}, "experts_per_layer must be at least 1, got 0"),
        ({"experts_per_layer": 5}, "layer 1 is to have 5 experts; it has 4"),
        ({"budget": 0}, "a budget of experts must be at least 1, got 0"),
        ({"budget": 9}, "a budget of 9 experts: the layers have 8"),
        ({"budget": 5, "first_layer": 2}, "a budget of 5 experts: the layers have 4"),
        ({"budget": 1.5}, "a budget as a share of all experts must be in (0, 1], got 1.5"),
        ({"budget": float("nan")}, "a budget as a share of all experts must be in (0, 1], got nan"),
        ({"like": ExpertSelection({2: [1, 0]})}, "layer 2 is to have 2 experts, and has no scores to choose them by"),
        ({"like": ExpertSelection({1: [4, 3, 2, 1, 0]})}, "layer 1 is to have 5 experts; it has 4"),
        ({"first_layer": 5}, "no layer from 5 on has scores; the last one is layer 4"),
        ({"against": GENERAL, "weight": -1}, "weight must be a number of at least 0, got -1"),
        ({"against": GENERAL, "weight": float("nan")}, "weight must be a number of at least 0, got nan"),
        ({"against": GENERAL, "weight": float("inf")}, "weight must be a number of at least 0, got inf"),
        ({"against": OTHER}, "the scores to select against are of another model: layer 1 has other experts"),
        ({"against": DEEPER}, "the scores to select against are of another model: there is a layer 5"),
        ({"by": "output", "against": GENERAL}, "there are no output scores to select by"),
        ({"by": "fisher"}, "there are no fisher scores to select by"),
    ],
)
def test_what_cannot_be_chosen_is_refused(how: dict, message: str):
    with pytest.raises(esft.InputError, match=f"^{re.escape(message)}$"):
        esft.select_experts(TASK, **how)

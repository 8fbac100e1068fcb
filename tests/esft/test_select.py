from pathlib import Path

import pytest
import torch
from esft.score import ExpertScores
from esft.select import ExpertSelection
from esft.swap import swap_state

import esft
from tests.esft.models import tiny_model

OFFICIAL = Path(__file__).resolve().parents[3] / "shared" / "esft-official"


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


def test_ties_go_to_the_lower_id():
    assert esft.select_experts(scores_of(0.25, 0.25, 0.25, 0.25), top_p=0.5).experts == {1: [0, 1]}


def test_top_p_of_one_takes_every_expert_that_was_used():
    assert esft.select_experts(scores_of(0.3, 0.3, 0.4), top_p=1.0).experts == {1: [2, 0, 1]}


@pytest.mark.parametrize("top_p", [0.0, -0.1, 1.01, float("nan")])
def test_top_p_outside_its_range_is_refused(top_p: float):
    with pytest.raises(esft.InputError, match="top_p"):
        esft.select_experts(scores_of(1.0), top_p=top_p)


def test_a_top_p_that_gate_scores_cannot_reach_is_refused():
    with pytest.raises(esft.InputError, match="gate scores sum to 0.300, below top_p 0.5"):
        esft.select_experts(scores_of(0.1, 0.2), by="gate", top_p=0.5)


def test_an_unknown_score_is_refused():
    with pytest.raises(esft.InputError, match="'rank'"):
        esft.select_experts(scores_of(1.0), by="rank")


def test_selection_files_round_trip(tmp_path):
    selection = ExpertSelection({1: [4, 2], 3: []}, shared_experts=True)
    selection.save(tmp_path / "e.json")
    assert ExpertSelection.load(tmp_path / "e.json") == selection


@pytest.mark.parametrize(
    "text",
    [
        "nonsense",
        "[]",
        '{"experts": [1]}',
        '{"experts": {"x": [1]}}',
        '{"experts": {"1": [2, 2]}}',
        '{"experts": {"1": "27"}}',
        '{"experts": {"1": [1.0]}}',
        '{"experts": {"1": [true]}}',
        '{"experts": {"01": [2]}}',
        '{"experts": {}, "shared_experts": "false"}',
    ],
)
def test_a_file_that_holds_no_selection_is_refused_by_name(tmp_path, text: str):
    (tmp_path / "e.json").write_text(text)
    with pytest.raises(esft.InputError, match="e.json"):
        ExpertSelection.load(tmp_path / "e.json")


@pytest.mark.parametrize(
    ("experts", "value"),
    [
        ({1: [5.0]}, r"\[5.0\]"),
        ({1: [True]}, r"\[True\]"),
        ({1: 2}, "got 2"),
        ({1: "5"}, "got '5'"),
        ({1: ["a"]}, r"\['a'\]"),
        ({1: torch.tensor([5])}, r"tensor\(\[5\]\)"),
        ({1: [torch.tensor(5)]}, r"tensor\(5\)"),
        ({1.0: [5]}, "layers must be whole numbers, got 1.0"),
        ({True: [5]}, "layers must be whole numbers, got True"),
        ([5], r"got \[5\]"),
    ],
)
def test_a_selection_of_anything_but_whole_numbers_is_refused_with_the_model_untouched(experts, value: str):
    model = tiny_model()
    with pytest.raises(esft.InputError, match=value):
        esft.swap(model, ExpertSelection(experts))
    assert swap_state(model) is None
    assert all(p.requires_grad for p in model.parameters())

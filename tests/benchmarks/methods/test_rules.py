"""Every rule trains as much as the paper's, and chooses by what it says."""

import random

import pytest

import esft
from benchmarks.methods import rules
from benchmarks.methods.cell import METHODS

LAYERS = (1, 2, 3, 4)
TOKEN = {layer: {expert: (expert + 1) / 36 for expert in range(8)} for layer in LAYERS}
OTHER = {layer: {expert: (8 - expert) * layer / 36 for expert in range(8)} for layer in LAYERS}
SCORES = esft.ExpertScores(
    TOKEN, TOKEN, output_scores=OTHER, fisher_scores=OTHER, fisher_rows_scores=OTHER
)  # fmt: skip


def counts(selection: esft.ExpertSelection) -> dict[int, int]:
    return {layer: len(ids) for layer, ids in selection.experts.items()}


@pytest.mark.parametrize(
    "name", ["output, shared", "fisher, shared", "fisher_rows, shared", "random, shared", "least used, shared"]
)
def test_others_choose_as_many_experts_of_each_layer_as_the_paper(name: str):
    rule = METHODS[name].rule
    found = rule(SCORES, random.Random(0))
    assert counts(found) == counts(rules.paper(SCORES)) and found.shared_experts
    if "random" in name:
        assert found == rule(SCORES, random.Random(0)) != rule(SCORES, random.Random(1))
    else:
        assert 0 in found.experts[1] and 7 not in found.experts[1]


def test_of_all_layers_as_many_are_chosen_in_all():
    number = rules.paper(SCORES).num_experts
    assert rules.over_all_layers(SCORES, random.Random(0)).num_experts == number
    upper = rules.upper_half(SCORES, random.Random(0))
    assert upper.num_experts == number and set(upper.experts) == {3, 4} and not upper.shared_experts


def test_the_paper_chooses_by_token_and_by_gate_with_what_else_trains():
    scores = esft.ExpertScores(TOKEN, {layer: {e: 0.3 * (e == 3) for e in range(8)} for layer in LAYERS})
    assert rules.chosen()(scores, random.Random(0)).experts[1] == [7, 6]
    by_gate = rules.chosen("gate", shared_experts=True, non_expert_modules=True)(scores, random.Random(0))
    assert by_gate.experts[1] == [3] and by_gate.shared_experts and by_gate.non_expert_modules

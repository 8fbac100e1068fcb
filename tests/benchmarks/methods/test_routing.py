"""Tables of the tasks' routing, by numbers that can be worked out by hand."""

import pytest
import torch

import esft
from benchmarks.methods import routing
from esft.data.examples import Example
from tests.esft.models import tiny_model

HALVES = esft.ExpertScores({1: {0: 0.5, 1: 0.25, 2: 0.25}, 2: {0: 0.1, 1: 0.1, 2: 0.8}}, {})
ONE, OTHER = esft.ExpertSelection({1: [0], 2: [2]}), esft.ExpertSelection({1: [0, 1], 2: [1]})


def test_concentration_is_the_share_of_the_most_used_experts_of_each_layer():
    (row,) = routing.concentration({"a": HALVES})
    assert (row["task"], row["1"], row["2"], row["4"]) == ("a", "65", "82", "100")
    assert (row["chosen"], row["in all"]) == ("1 to 1", 2)  # half, and four fifths: each more than the rule asks for


def test_the_overlap_is_what_both_have_of_what_either_has():
    assert routing.overlap(ONE, ONE) == 1 and routing.overlap(ONE, OTHER) == 1 / 4
    assert routing.overlaps({"a": ONE, "b": OTHER})[0] == {"task": "a", "a": "1.00", "b": "0.25"}
    assert routing.agreement([ONE, ONE, OTHER]) == pytest.approx((1 + 0.25 + 0.25) / 3)


def test_what_is_touched_are_the_rows_that_go_to_the_chosen_experts():
    assert routing.share_of_rows(ONE, HALVES) == pytest.approx((0.5 + 0.8) / 2)
    other = esft.ExpertScores({1: {0: 0.0, 1: 1.0}, 2: {2: 0.5, 1: 0.5}}, {})
    assert routing.touched({"a": ONE}, {"a": HALVES}, {"prose": other}) == [
        {"task": "a", "its own": "65", "prose": "25"}
    ]


def test_choices_are_compared_that_were_made_from_other_text(monkeypatch):
    monkeypatch.setattr(routing, "ROW", 8)
    monkeypatch.setattr(routing, "SAMPLES", (1, 2))
    monkeypatch.setattr(routing, "load", lambda _: tiny_model("olmoe"))
    seen = []
    monkeypatch.setattr(routing, "_chosen", lambda model, batches: seen.append(batches) or ONE)
    ids = [torch.randint(5, 90, (8,)).tolist() for _ in range(40)]
    assert routing.stability([Example(row, row) for row in ids]) == {"8": "1.00", "16": "1.00"}
    rows = [tuple(batch["input_ids"].flatten().tolist()) for batches in seen for batch in batches]
    assert len(rows) == routing.DRAWS * (1 + 2) == len(set(rows))

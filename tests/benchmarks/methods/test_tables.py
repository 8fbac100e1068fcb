"""Figures of cells become means, errors and intervals that can be worked out by hand."""

import math

import pytest

from benchmarks.methods import tables


def cell(method: str, task: str, seed: int, score: float, loss: float = 2.0, **more) -> dict:
    found = {"method": method, "task": task, "seed": seed, "score": score, "split": "test", "general": {"prose": loss}}
    return found | {"rate": 1e-3, "steps": 2, "parameters": 1000} | more


ESFT = {"trained_parameters": 100, "stored_bytes": 2_000_000, "seconds": 10.0, "peak_memory": 3_000_000}
FULL = {"trained_parameters": 1000, "stored_bytes": 20_000_000, "seconds": 30.0, "peak_memory": 9_000_000}
CELLS = [
    cell("base", "a", 1, 0.0),
    cell("base", "b", 1, 0.5),
    cell("esft-token, shared", "a", 1, 0.5, 2.25, **ESFT),
    cell("esft-token, shared", "a", 2, 0.7, 2.25, **ESFT),
    cell("esft-token, shared", "b", 1, 0.8, 2.25, **ESFT),
    cell("esft-token, shared", "b", 2, 0.6, 2.25, **ESFT),
    cell("full", "a", 1, 0.6, 3.0, **FULL),
    cell("full", "a", 2, 0.7, 2.5, **FULL),
    cell("full", "b", 1, 0.7, 3.0, **FULL),
    cell("full", "b", 2, 0.9, 2.5, **FULL),
]


def row(text: str, method: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {method} ")]
    return [part.strip() for part in line.strip("|").split("|")][1:]


def test_scores_have_means_and_errors_over_seeds_and_over_tasks():
    table = tables.by_task(CELLS, lambda cell: 100 * cell["score"])
    assert row(table, "base") == ["0.00", "50.00", "25.00"]
    # Means over tasks of the two seeds: 65 and 65; of full training 65 and 80.
    assert row(table, "esft-token, shared") == ["60.00 ± 10.00", "70.00 ± 10.00", "65.00 ± 0.00"]
    assert row(table, "full")[-1] == "72.50 ± 7.50"
    # A seed that lacks a task counts in no mean over tasks.
    assert row(tables.by_task(CELLS[:-1], lambda cell: 100 * cell["score"]), "full")[-1] == "65.00"


def test_losses_are_shown_as_their_rise_above_the_base():
    assert row(tables.rises(CELLS), "esft-token, shared") == ["0.25 ± 0.00"]
    assert row(tables.rises(CELLS), "full") == [f"0.75 ± {0.5 / math.sqrt(12):.2f}"]
    assert tables.rises(CELLS[2:]) == "No figures of the base."


def test_costs_are_means_and_shares():
    assert row(tables.costs(CELLS), "full") == ["1,000", "100.0%", "20.0", "30", "9"]
    assert row(tables.costs(CELLS), "esft-token, shared") == ["100", "10.0%", "2.0", "10", "3"]
    assert tables.costs(CELLS[:2]) == "Nothing was trained."


def test_differences_are_paired_by_task_and_seed():
    found = row(tables.differences(CELLS, "esft-token, shared"), "full")
    low, high = tables.interval([10.0, 0.0, -10.0, 30.0])
    assert found == ["4", "+7.5", f"{low:+.1f} to {high:+.1f}"]
    # Student's t for three degrees of freedom is 3.182 at 97.5%; the standard error is 17.08 / 2.
    assert (low, high) == pytest.approx((7.5 - 3.1824 * 8.539, 7.5 + 3.1824 * 8.539), abs=0.01)
    assert tables.interval([2.0, 2.0]) == (2.0, 2.0)
    assert tables.differences(CELLS[:2], "esft-token, shared") == "No pairs."


def test_what_was_measured_to_choose_the_rate_is_in_a_table_of_its_own():
    tried = [
        cell("full", "a", 0, score) | {"split": "validation", "rate": rate}
        for rate, score in ((2e-3, 0.5), (1e-3, 0.99))
    ]
    alone, both = tables.page(CELLS), tables.page([*CELLS, *tried])
    assert row(tables.trials(tried), "full") == ["0.001: 99.0, 0.002: 50.0"]
    assert both == alone.replace("None were tried.", tables.trials(tried))
    assert both.count("\n## ") == 4
    assert tables.page(tried).count("Nothing was tested.") == 1

import math

import pytest
import torch

from benchmarks import layer, peers
from benchmarks.shapes import GPT_OSS, LayerShape, skewed_top_k
from esft_kernels.formats.resolve import FORMATS

SMALL = LayerShape("small", 32, 16, 8, 3)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    pytest.importorskip("peft")
    return layer.run(SMALL, 80, torch.float32, CPU, "cpu", rounds=3)


def test_every_peer_has_a_row_with_its_time_and_ratio(rows):
    problem = layer.make_problem(SMALL, 8, torch.float32, CPU)
    assert [row["peer"] for row in rows] == [*layer.peers_of(problem, "cpu"), "dense GEMMs"]
    assert all(row["peer ms"] > 0 and row["esft ms"] > 0 and row["peer / esft"] > 0 for row in rows)
    assert all(row["esft error"] < 1e-4 for row in rows)


def test_saved_bytes_are_x_h_and_the_routing_and_less_than_the_peers(rows):
    t, k, d, f, e = 80, 3, 32, 16, 8
    routing = 8 * (3 * t * k + e + 1) + 4 * t * k  # int64 tables, float32 weights
    assert rows[0]["esft saved MB"] * 1e6 == 4 * t * d + 4 * 2 * f * t * k + routing
    assert all(
        row["saved MB"] > row["esft saved MB"] for row in rows if not row["peer"].startswith(("esft", "dense GEMMs"))
    )


def test_peers_give_their_gradients():
    problem = layer.make_problem(SMALL, 80, torch.float32, CPU)
    _, _, _, gate_up, down = peers.ours(problem, problem.chosen, "reference").run(problem)
    _, _, _, all_gate_up, all_down = peers.stock(problem, "grouped_mm", True).run(problem)
    torch.testing.assert_close(all_gate_up[problem.chosen], gate_up)
    torch.testing.assert_close(all_down[problem.chosen], down)
    gate, up, first_down = peers.per_expert(problem).run(problem)[3:6]
    torch.testing.assert_close(torch.cat([gate, up]), gate_up[0])
    torch.testing.assert_close(first_down, down[0])


def test_adapters_in_one_batch_share_the_gradients_of_one():
    problem = layer.make_problem(SMALL, 80, torch.float32, CPU)
    several = peers.mixed(problem, 3, "cpu").run(problem)
    assert [g.shape[0] for g in several[3:]] == [3 * len(problem.chosen)] * 2
    for mixed, alone in zip(several, peers.ours(problem, problem.chosen, "cpu").run(problem), strict=True):
        parts = mixed.unflatten(0, (3, -1)).sum(dim=0) if mixed.shape != alone.shape else mixed
        torch.testing.assert_close(parts, alone, atol=1e-4, rtol=1e-4)


def test_only_the_named_peers_and_the_limit_are_timed():
    rows = layer.run(SMALL, 40, torch.float32, CPU, "cpu", 2, {"per-expert, chosen"})
    assert [row["peer"] for row in rows] == ["per-expert, chosen", "dense GEMMs"]


def test_a_wrong_backend_is_not_timed(monkeypatch):
    real = peers.routed_mlp
    monkeypatch.setattr(peers, "routed_mlp", lambda *args: real(*args) * (1.1 if args[-1] == "cpu" else 1))
    with pytest.raises(RuntimeError, match="not timed"):
        layer.run(SMALL, 40, torch.float32, CPU, "cpu", 2)


def test_a_peer_that_computes_something_else_is_not_timed(monkeypatch):
    real = peers._OneExpert.forward
    monkeypatch.setattr(peers._OneExpert, "forward", lambda self, x: 1.1 * real(self, x))
    with pytest.raises(RuntimeError, match="per-expert, chosen: off from esft"):
        layer.run(SMALL, 40, torch.float32, CPU, "reference", 2, {"per-expert, chosen"})


def test_routings_are_distinct_and_have_the_wanted_share():
    index = skewed_top_k(SMALL, 3000, [0, 1], 0.4, torch.Generator().manual_seed(0))
    assert all(len(set(row)) == 3 for row in index.tolist())
    assert (index < 2).float().mean().item() == pytest.approx(0.4, abs=0.01)


def test_flops_count_the_matrix_products():
    # Per row: up [D -> 2F] and down [F -> D] forward, the same again for dX; the same once more for dW of trained rows.
    d, f, rows, trained = 32, 16, 40 * 3, 13
    forward = 2 * d * 2 * f + 2 * f * d
    assert SMALL.flops(40, trained) == forward * (2 * rows + trained)


def test_layers_of_another_layout_have_no_peers_but_ourselves():
    problem = layer.make_problem(LayerShape("o", 32, 16, 8, 3, GPT_OSS), 8, torch.float32, CPU)
    formats = [f"esft, frozen in {name}" for name in FORMATS]
    assert list(layer.peers_of(problem, "cpu")) == [
        "esft, all trained",
        "esft, 8 adapters",
        "esft, frozen packed",
        *formats,
    ]


def test_a_result_that_is_no_number_is_an_error_wherever_it_comes():
    right, broken = torch.ones(3), torch.tensor([1.0, float("nan"), 1.0])
    assert layer.largest_error([right, 1.5 * right], [right, right]) == pytest.approx(0.5)
    for found in ([right, broken], [broken, right], [right, right, broken]):
        assert math.isnan(layer.largest_error(found, [right] * len(found)))


def test_ratios_are_of_a_peers_time_to_ours_round_by_round():
    row = layer._row(SMALL, 80, {"esft": [1.0, 2.0, 4.0], "x": [2.0, 6.0, 16.0]})
    assert row == {
        "shape": "small", "tokens": 80, "peer": "x", "peer ms": 6e3, "esft ms": 2e3, "peer / esft": 3.0,
        "quartiles": "2.00-4.00",
    }  # fmt: skip


def test_tasks_take_turns_and_two_rounds_warm_up():
    calls = []
    tasks = {name: lambda name=name: calls.append(name) for name in "ab"}
    seconds = layer.interleaved(tasks, 3, CPU)
    assert calls == ["a", "b"] * 5 and [len(taken) for taken in seconds.values()] == [3, 3]

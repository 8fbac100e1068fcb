import pytest
import torch

from benchmarks import layer
from benchmarks.shapes import LayerShape, skewed_top_k

SMALL = LayerShape("small", 32, 16, 8, 3)


def test_a_run_reports_times_of_both_variants():
    row = layer.run(SMALL, 40, torch.float32, torch.device("cpu"), "cpu", rounds=3)
    assert row["error"] < 1e-5
    assert row["chosen ms"] > 0 and row["all ms"] > 0


def test_a_wrong_backend_is_not_timed(monkeypatch):
    real = layer.expert_mlp
    monkeypatch.setattr(
        layer, "expert_mlp", lambda x, w, p, r, backend: real(x, w, p, r, backend) * (1.1 if backend == "cpu" else 1)
    )
    with pytest.raises(RuntimeError, match="not timed"):
        layer.check(SMALL, torch.float32, torch.device("cpu"), "cpu")


def test_routings_are_distinct_and_have_the_wanted_share():
    index = skewed_top_k(SMALL, 3000, [0, 1], 0.4, torch.Generator().manual_seed(0))
    assert all(len(set(row)) == 3 for row in index.tolist())
    assert (index < 2).float().mean().item() == pytest.approx(0.4, abs=0.01)


def test_flops_count_the_matrix_products():
    # Per row: up [D -> 2F] and down [F -> D] forward, the same again for dX; the same once more for dW of trained rows.
    d, f, rows, trained = 32, 16, 40 * 3, 13
    forward = 2 * d * 2 * f + 2 * f * d
    assert SMALL.flops(40, trained) == forward * (2 * rows + trained)

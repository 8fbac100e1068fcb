"""The benchmark of several processes."""

import pytest

from benchmarks import ranks
from tests.esft.models import save_tiny


def test_steps_of_two_processes_are_timed_and_what_they_send_is_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(ranks, "METHODS_TIMED", ("esft",))
    (row,) = ranks.run(str(save_tiny(tmp_path / "base")), 4, 8, 2, [2])
    assert (row["method"], row["processes"], row["times one process"]) == ("esft", 2, None)
    assert row["tokens/s"] > 0 and row["sent, MB"] >= row["gradients, MB"] > 0


def test_bytes_of_larger_jobs_are_computed_from_the_models_sizes():
    (two, four) = ranks.computed([ranks.Path(__file__).parents[2] / "benchmarks" / "models" / "olmoe-1b-7b"], [2, 4], 1)
    assert float(four["full"]) == pytest.approx(1.5 * float(two["full"]), rel=0.01)
    assert float(two["full, FSDP"]) == pytest.approx(1.5 * float(two["full"]), rel=0.01)
    # 16 layers of one expert, 3 x 2048 x 1024 parameters each, in bf16.
    assert float(two["ESFT"]) == pytest.approx(16 * 3 * 2048 * 1024 * 2 / 1e9, abs=0.006)
    # Embeddings and head stay whole. Of experts 2,048 tokens are sent, of 16 layers: four times hidden states, and ids,
    # weights and gradients of eight.
    assert float(two["ESFT, frozen sharded"]) == pytest.approx(
        float(two["full"]) - 2 * 50304 * 2048 * 2 / 1e9, abs=0.02
    )
    assert float(two["ESFT, experts dealt out"]) == pytest.approx(2048 * 16 * (4 * 2048 * 2 + 16 * 8) / 1e9, abs=0.006)

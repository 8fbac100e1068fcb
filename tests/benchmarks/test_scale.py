import pytest

from benchmarks import scale
from benchmarks.scale import measure
from esft.selection import ExpertSelection
from tests.benchmarks.test_random_checkpoint import small


@pytest.mark.slow
def test_every_stage_runs_at_small_sizes(tmp_path, monkeypatch):
    small(tmp_path, monkeypatch)
    monkeypatch.setattr(scale, "TOKENS", 128)
    settings = {"frozen": "nf4", "frozen_linear": "int8", "optimizer": "adamw_8bit", "recompute": "layers"}
    rows = measure("small", settings, None, tmp_path / "work", None, set(scale.STAGES))
    assert [(row["stage"], row["status"]) for row in rows] == [(stage, 0) for stage in scale.STAGES], rows
    kept = (tmp_path / "work" / "small.run" / "config.yaml").read_text()
    assert all(f"{name}: {value}\n" in kept for name, value in settings.items())
    assert all(row["anonymous_gb"] > 0.01 and row["seconds"] > 0 for row in rows)
    train, merge = rows[2], rows[3]
    assert train["tokens_per_second"] > 0 and 0 < train["share_of_dense"] < 1 and train["disk_gb"] > 0
    assert merge["disk_gb"] > 0 and not (tmp_path / "work" / "small.merged").exists()
    stopped = measure("small", {"frozen": "nf3"}, None, tmp_path / "work", None, {"score", "train"})
    assert [row["stage"] for row in stopped] == ["score"] and "nf3" in stopped[0]["said"]


@pytest.mark.slow
def test_what_a_user_would_take_instead_is_measured_and_may_die(tmp_path, monkeypatch):
    small(tmp_path, monkeypatch, moe_intermediate_size=24)  # grouped_mm wants rows of whole 16 bytes
    monkeypatch.setattr(scale, "TOKENS", 128)
    rows = measure("small", {}, None, tmp_path / "work", None, set(scale.PEERS))
    assert [(row["stage"], row["status"]) for row in rows] == [(stage, 0) for stage in scale.PEERS], [
        row["said"] for row in rows
    ]
    assert all(row["tokens_per_second"] > 0 and row["anonymous_gb"] > 0.01 for row in rows)
    monkeypatch.setattr(scale, "write_checkpoint", lambda name, folder: folder)
    next((tmp_path / "work" / "small").glob("*.safetensors")).unlink()
    (died,) = measure("small", {}, None, tmp_path / "work", None, {"stock lora"})
    assert died["status"] and "tokens_per_second" not in died


def test_so_many_experts_of_every_layer_can_be_named(tmp_path, monkeypatch):
    small(tmp_path, monkeypatch)
    monkeypatch.setattr(scale, "MODELS", tmp_path / "models")
    found = ExpertSelection.load(scale.first_experts("small", 2, tmp_path / "e.json"))
    assert found.experts == {1: [0, 1], 2: [0, 1]}


def test_a_table_has_every_figure_that_a_stage_has():
    rows = scale.shown([{"stage": "train", "seconds": 12.345, "disk_gb": 0.5}, {"stage": "merge", "said": "done"}])
    assert rows == [
        {"stage": "train", "seconds": "12.3", "disk_gb": "0.5", "said": ""},
        {"stage": "merge", "seconds": "", "disk_gb": "", "said": "done"},
    ]

import weakref

import pytest
import torch
from transformers import AutoConfig

pytest.importorskip("triton")
pytest.importorskip("peft")
from benchmarks import gpu_steps
from benchmarks.plan import MODELS
from tests.esft.models import _SIZES, FAMILIES

CPU = torch.device("cpu")
PEERS = [peer for peer in (*gpu_steps.OURS, *gpu_steps.STOCK) if peer != "esft, layers compiled"]  # that takes long


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for name, value in {"LENGTH": 16, "SEQUENCES": (1, 2), "PROMPT": 4, "NEW": 3, "GENERATED": (1, 2)}.items():
        monkeypatch.setattr(gpu_steps, name, value)
    monkeypatch.setattr(gpu_steps, "rate_of", lambda device: 1e9)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    # grouped_mm wants multiples of 16 bytes
    sizes = _SIZES | FAMILIES["deepseek_v2"][0] | {"moe_intermediate_size": 24, "num_hidden_layers": 2}
    folder = tmp_path_factory.mktemp("models") / "olmoe-1b-7b"
    AutoConfig.for_model("deepseek_v2", **sizes).save_pretrained(folder)
    return folder


def timed(folder, peer: str, memory: float = 1e12) -> list[dict]:
    return gpu_steps.time_steps(str(folder), peer, CPU, 2, memory, "NVIDIA H100 80GB HBM3")


@pytest.mark.parametrize("peer", PEERS)
def test_every_peer_is_timed(folder, peer):
    rows = timed(folder, peer)
    assert [(row["peer"], row["sequences"], row["remark"]) for row in rows] == [(peer, 1, ""), (peer, 2, "")]
    for row in rows:
        assert row["tokens/s"] == pytest.approx(row["sequences"] * 16e3 / row["ms"], abs=0.5)
        assert row["hidden states off"] < (0.1 if "nf4" in peer else 0.01)
        parts = [float(part) for part in row["forward, backward, update"].split(", ")]
        assert len(parts) == 3 and sum(parts) > 0
        assert float(row["of peak"].rstrip("%")) >= 0 and float(row["of dense"].rstrip("%")) > 0


def test_what_cannot_fit_is_not_tried_and_says_what_it_needs(folder, monkeypatch):
    monkeypatch.setattr(gpu_steps, "make_model", None)
    parameters = sum(p.numel() for p in gpu_steps.load_skeleton(str(folder)).parameters())
    assert gpu_steps.at_least(str(folder), "transformers grouped_mm, full") == 8 * parameters
    # bf16 with its low bits and its gradient, and moments in float32.
    assert gpu_steps.at_least(str(folder), "esft, everything trained") == (2 + 2 + 2 + 8) * parameters
    rows = timed(folder, "transformers grouped_mm, full", memory=8 * parameters - 1)
    assert [(row["sequences"], row["tokens/s"]) for row in rows] == [(1, ""), (2, "")]
    assert all(row["remark"].startswith("does not fit: 0 GB of weights") for row in rows)


def test_memory_that_does_not_reach_is_a_row_and_leaves_nothing_behind(folder, monkeypatch):
    made, real_make, real_time = [], gpu_steps.make_model, gpu_steps.interleaved

    def make(*args):
        made.append(weakref.ref(model := real_make(*args)))
        return model

    def time_them(tasks, rounds, device, ahead):
        seconds = real_time(tasks, rounds, device, ahead)
        calls.append(len(calls))
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return seconds

    calls: list[int] = []
    monkeypatch.setattr(gpu_steps, "make_model", make)
    monkeypatch.setattr(gpu_steps, "interleaved", time_them)
    monkeypatch.setattr(gpu_steps, "peak", lambda device: 3.0)
    first, second = timed(folder, "esft")
    assert first["tokens/s"] > 0 and first["remark"] == "" and second["tokens/s"] == ""
    assert second["remark"] == "out of memory at 3.0 GB, 2.15 GB more were asked for"
    assert [each() for each in made] == [None]


def test_a_peer_of_another_loss_is_not_timed(folder, monkeypatch):
    real = gpu_steps.outlook
    factors = iter([1.0, 1.03])
    monkeypatch.setattr(gpu_steps, "outlook", lambda *args: (real(*args)[0] * next(factors), torch.ones(1)))
    with pytest.raises(RuntimeError, match="esft: loss .* where the stock model has .*; not timed"):
        timed(folder, "esft")


def test_the_swapped_model_is_used_beside_the_stock_one(folder):
    rows = gpu_steps.time_use(str(folder), CPU)
    assert [row["what"] for row in rows] == [
        "scoring, 2 x 16 tokens",
        "generating, 1 x 3 tokens",
        "generating, 2 x 3 tokens",
    ]
    assert all(row["esft tokens/s"] > 0 and row["grouped_mm tokens/s"] > 0 for row in rows)


def test_memory_is_planned_of_the_steps_that_are_timed(folder):
    rows = gpu_steps.memory_planned(str(folder))
    assert [(row["peer"], row["sequences"]) for row in rows] == [(p, n) for p in gpu_steps.OURS for n in (1, 2)]
    found = {row["peer"]: row["planned GB"] for row in rows if row["sequences"] == 2}
    assert found["esft, frozen in nf4"] < found["esft"] < found["esft, everything trained"]
    assert all(found[peer] > gpu_steps.at_least(str(folder), peer) / 1e9 for peer in found)


def test_every_peer_has_its_place_with_every_model_but_eager():
    paths = [MODELS / "olmoe-1b-7b", MODELS / "deepseek-v2-lite"]
    todo = list(gpu_steps.parts(paths, CPU, 1, 1e12, "x"))
    whats = [*PEERS, "esft, layers compiled", gpu_steps.USE, gpu_steps.PLANS]
    wanted = {f"{path.name}: {what}" for path in paths for what in whats}
    assert set(todo) == wanted - {"deepseek-v2-lite: transformers eager, full"} and len(todo) == len(set(todo))
    assert todo[0] == "olmoe-1b-7b: esft" and todo[-1] == "deepseek-v2-lite: memory, computed"

import json

import pytest
import torch

pytest.importorskip("triton")
from benchmarks import gpu, tune
from benchmarks.shapes import SHAPES, LayerShape
from esft.errors import InputError
from esft_kernels.triton_ops.tiles import Tiles

SMALL = LayerShape("small", 32, 16, 3, 2)
CPU = torch.device("cpu")
ABOUT = {"device": "a GPU", "dtype": "float32"}


def test_every_tile_is_held_to_the_reference(monkeypatch):
    monkeypatch.setattr(gpu, "CHECKED_TOKENS", 6)
    other = Tiles(16, 64, 32, 4, 1)
    monkeypatch.setattr(tune, "candidates", lambda first, op, arch: [first, other, other])
    rows = gpu.check_tiles(SMALL, torch.float32, CPU, most=2, workers=1)
    assert {row["kernel"].split()[2] for row in rows} == {"up", "gemm", "grad", "wgrad"}
    assert all((row["right"], row["does not fit"], row["wrong"]) == (2, 0, []) for row in rows)
    assert all(0 < row["largest error"] < 1e-4 for row in rows)


def test_a_tile_that_is_wrong_is_named_and_one_too_large_is_counted(monkeypatch):
    class OutOfResources(Exception):
        pass

    class Step:
        """Right, wrong by as much as the result, too large, and wrong by half of it, in turn."""

        def __init__(self):
            self.results = iter((1.0, 2.0, None, 1.5))

        def run(self, problem):
            if (result := next(self.results)) is None:
                raise OutOfResources
            return [torch.full((2,), result)]

    monkeypatch.setattr(gpu, "CHECKED_TOKENS", 6)
    monkeypatch.setattr(gpu.peers, "ours", lambda *args: Step())
    first, other = Tiles(16, 32, 64, 4, 1), Tiles(16, 64, 32, 4, 1)
    monkeypatch.setattr(tune, "asked", lambda step, problem: {"a key": ("sm_90", "up", first)})
    monkeypatch.setattr(tune, "candidates", lambda first, op, arch: [first, other, other, other])
    (row,) = gpu.check_tiles(SMALL, torch.float32, CPU, most=4, workers=1)
    assert row == {"kernel": "a key", "right": 1, "does not fit": 1, "wrong": [str(other)] * 2, "largest error": 1.0}


def test_a_gpu_that_is_known_gets_shares_of_its_peaks(monkeypatch):
    shape = SHAPES["deepseek-v2-lite"]
    monkeypatch.setattr(gpu.layer, "run", lambda *args: [{"peer": "x", "esft ms": 10.0}])
    (row,) = gpu.time_layer(shape, 4096, torch.bfloat16, CPU, 1, "NVIDIA H100 80GB HBM3")
    # 24,576 rows, 22% of them trained, 8.65e6 weights an expert: 2 * 8.65e6 * (2 * 24,576 + 5,407) FLOPs in 10 ms.
    assert row["of peak"] == f"{2 * 8_650_752 * (2 * 24_576 + 5_407) / 0.01 / 989e12:.0%}"
    assert 0 < int(row["of roofline"].rstrip("%")) < 100
    assert gpu.time_layer(shape, 4096, torch.bfloat16, CPU, 1, "Another") == [{"peer": "x", "esft ms": 10.0}]


def test_what_was_done_is_kept_and_what_failed_is_done_again(tmp_path):
    calls = []

    def part(name: str, fails: bool = False):
        def made():
            calls.append(name)
            if fails:
                raise RuntimeError("broke")
            return [{"value": 1.5}]

        return made

    done = gpu.run({"a": part("a"), "b": part("b", fails=True), "c": part("c")}, ABOUT, tmp_path, 1.0)
    assert done == {"a": [{"value": 1.5}], "b": [{"error": "RuntimeError: broke"}], "c": [{"value": 1.5}]}
    assert json.loads((tmp_path / "results.json").read_text()) == {"about": ABOUT, "parts": done}
    page = (tmp_path / "report.md").read_text()
    assert page.startswith("# Measured on a GPU\n") and "RuntimeError: broke" in page and "1.500" in page
    done = gpu.run({name: part(name) for name in "abcd"}, ABOUT, tmp_path, 1.0)
    assert calls == ["a", "b", "c", "b", "d"] and all(rows == [{"value": 1.5}] for rows in done.values())
    with pytest.raises(InputError, match=r"results.json: is of .*a GPU.* and this is .*another"):
        gpu.run({}, ABOUT | {"device": "another"}, tmp_path, 1.0)


def test_when_the_minutes_are_over_the_page_names_what_is_left(tmp_path):
    todo = {name: lambda: [{"value": 2}] for name in "ab"}
    assert gpu.run(todo, ABOUT, tmp_path / "new", -1.0) == {}
    gpu.run({"a": todo["a"]}, ABOUT, tmp_path, 1.0)
    assert "## b\n\nNot done yet: run it again." in gpu.page(ABOUT, gpu.run(todo, ABOUT, tmp_path, -1.0), ["a", "b"])


def test_all_is_checked_before_anything_is_timed():
    names = list(gpu.parts([SMALL, SHAPES["tiny"]], [64, 4096], torch.float32, CPU, 1, 1, "x", 1))
    assert names == [
        "Launches of small", "Tiles of small", "Launches of tiny", "Tiles of tiny",
        "Variants of small, 64 tokens", "small, 64 tokens", "Variants of small, 4,096 tokens", "small, 4,096 tokens",
        "Variants of tiny, 64 tokens", "tiny, 64 tokens", "Variants of tiny, 4,096 tokens", "tiny, 4,096 tokens",
    ]  # fmt: skip


def test_results_are_of_a_dtype_and_of_the_kernels_as_they_are(tmp_path, monkeypatch):
    before = gpu.about(CPU, torch.bfloat16)
    assert before["dtype"] == "bfloat16"
    for kind in ("changed", "changed again"):  # the kernels
        (tmp_path / "op.py").write_text(kind)
        monkeypatch.setattr(gpu.esft_kernels, "__file__", str(tmp_path / "__init__.py"))
        after = gpu.about(CPU, torch.bfloat16)
        assert after["kernels"] != before["kernels"] and before | {"kernels": after["kernels"]} == after
        before = after


def test_a_rehearsal_on_a_cpu_leaves_a_page_of_real_figures(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "CHECKED_TOKENS", 4)
    monkeypatch.setattr(gpu.layer, "peers_of", lambda problem, backend: {})
    monkeypatch.setattr(gpu, "variants", lambda first, op, arch: {"descriptors": first})  # one of them
    todo = gpu.parts([SMALL], [4], torch.float32, CPU, 2, 1, "x", 1)
    done = gpu.run(todo, gpu.about(CPU, torch.float32), tmp_path, 5.0)
    assert done.keys() == todo.keys() and not any("error" in rows[0] for rows in done.values()), done
    assert done["small, 4 tokens"][0]["esft ms"] > 0
    variants = done["Variants of small, 4 tokens"]
    assert [(row["tiles"], row["is"]) for row in variants] == [("chosen", "right"), ("descriptors", "right")]
    assert all(row["step ms"] > 0 and 0 < row["largest error"] < 1e-4 for row in variants)


def test_a_variant_that_is_wrong_or_does_not_fit_is_not_timed(monkeypatch):
    monkeypatch.setattr(gpu, "variants", lambda first, op, arch: dict.fromkeys(("descriptors", "persistent"), first))
    errors = iter([1e-6, 0.5, None])
    monkeypatch.setattr(tune, "error_of", lambda step, problem, expected: next(errors))
    timed = []
    monkeypatch.setattr(
        gpu.layer, "interleaved", lambda tasks, rounds, device: timed.extend(tasks) or dict.fromkeys(tasks, [0.002])
    )
    rows = gpu.time_variants(SMALL, 4, torch.float32, CPU, 1)
    assert [(row["is"], row["step ms"]) for row in rows] == [("right", 2.0), ("wrong", None), ("does not fit", None)]
    assert timed == ["chosen"]

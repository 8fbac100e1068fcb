import itertools
import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")
from benchmarks import layer, tune
from benchmarks.shapes import LayerShape
from esft_kernels.triton_ops import tiles
from esft_kernels.triton_ops.tiles import Tiles, choose_tiles, tile_key, tiles_for

SMALL = LayerShape("small", 32, 16, 3, 2)
CPU = torch.device("cpu")
OTHER = Tiles(16, 64, 32, 4, 1)


def run_all(tasks) -> None:
    for task in tasks.values():
        task()


@pytest.fixture
def fresh():
    tiles.tuned.cache_clear(), tiles.usual_tiles.cache_clear()
    yield
    tiles.tuned.cache_clear(), tiles.usual_tiles.cache_clear()


def test_the_fastest_tiles_are_kept_and_then_used(tmp_path, monkeypatch, fresh):
    out = tmp_path / "tiles.json"
    out.write_text('{"kept": {"block_m": 16, "block_n": 32, "block_k": 32, "num_warps": 4, "num_stages": 1}}')
    monkeypatch.setattr(tune, "variants", lambda first, op, arch: {"other": OTHER})
    monkeypatch.setattr(tune, "near", lambda first: [])
    ticks = iter(range(10**6, 0, -1))  # every step takes less time than the one before
    monkeypatch.setattr(
        layer, "interleaved", lambda tasks, rounds, device: run_all(tasks) or dict.fromkeys(tasks, [next(ticks)])
    )
    *rows, whole = tune.run(SMALL, 5, torch.float32, CPU, 1, out)
    found = json.loads(out.read_text())
    assert whole["kernel"] == "all" and whole["before ms"] == whole["after ms"]  # timed side by side
    assert len(rows) == len(found) - 1 >= 4 and "kept" in found
    assert all(Tiles(**values) == OTHER for key, values in found.items() if key != "kept")

    monkeypatch.setenv("ESFT_TILES", str(out))
    key = next(key for key in found if " up " in key)
    features = tuple(int(size) for size in key.split()[-1].split("x"))
    tensor, rows_per_expert = torch.empty(0), 1 << int(key.split()[-2]) >> 1
    assert tile_key("interpreter", torch.float32, "up", rows_per_expert, features) == key
    assert tiles_for(tensor, "up", rows_per_expert, features) == OTHER
    assert tiles_for(tensor, "up", 10**6, features) == choose_tiles("interpreter", torch.float32, "up", 10**6, features)


def test_the_tables_choice_stays_where_nothing_is_faster(tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "variants", lambda first, op, arch: {"other": OTHER})
    monkeypatch.setattr(tune, "near", lambda first: [])
    ticks = iter(range(10**6))
    monkeypatch.setattr(
        layer, "interleaved", lambda tasks, rounds, device: run_all(tasks) or dict.fromkeys(tasks, [next(ticks)])
    )
    rows = tune.run(SMALL, 5, torch.float32, CPU, 1, tmp_path / "tiles.json")
    assert json.loads((tmp_path / "tiles.json").read_text()) == {}
    assert all(row["before ms"] <= row["after ms"] and row["wrong"] == [] for row in rows)


def test_what_is_wrong_or_does_not_fit_is_not_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "variants", lambda first, op, arch: {"other": OTHER, "large": replace(OTHER, block_m=32)})
    monkeypatch.setattr(tune, "near", lambda first: [])
    errors = itertools.cycle([float("nan"), None])
    monkeypatch.setattr(tune, "error_of", lambda step, problem, expected: next(errors))
    timed = []
    monkeypatch.setattr(
        layer, "interleaved", lambda tasks, rounds, device: timed.append(len(tasks)) or dict.fromkeys(tasks, [1.0])
    )
    *rows, _ = tune.run(SMALL, 5, torch.float32, CPU, 1, tmp_path / "tiles.json")
    assert len(rows) >= 4 and timed == [1] * 2 * len(rows) + [2]  # no candidate: what there is, before either round
    assert all(row["wrong"] == [str(OTHER)] and row["tiles"] != str(OTHER) for row in rows)


def test_ways_to_load_are_tried_before_the_sizes_of_the_best(tmp_path, monkeypatch):
    described = replace(OTHER, descriptors=True)
    monkeypatch.setattr(tune, "variants", lambda first, op, arch: {"described": described})
    monkeypatch.setattr(tune, "near", lambda first: [replace(first, block_n=32)])
    ticks = iter(range(10**6, 0, -1))
    monkeypatch.setattr(layer, "interleaved", lambda tasks, rounds, device: dict.fromkeys(tasks, [next(ticks)]))
    tune.run(SMALL, 5, torch.float32, CPU, 1, tmp_path / "tiles.json")
    found = json.loads((tmp_path / "tiles.json").read_text())
    assert len(found) >= 4 and all(Tiles(**values) == replace(described, block_n=32) for values in found.values())


def test_candidates_are_tiles_that_registers_hold():
    first = choose_tiles("sm_90", torch.bfloat16, "up", 1024, (2816, 2048))
    found = tune.candidates(first, "up", "sm_90")
    assert found[0] == first and len(found) == len(set(found)) > 20
    assert all(t.block_m * t.block_n <= tune.MAX_ACCUMULATORS * 32 * t.num_warps for t in found[1:])
    ways = {(t.descriptors, t.persistent > 0) for t in found}
    assert ways == {(False, False), (True, False), (False, True), (True, True)}


def test_several_processes_find_what_one_finds():
    given = tune.Given(SMALL, 5, torch.float32, CPU)
    problem = given.problem()
    asked = tune.asked(tune.peers.ours(problem, problem.chosen, "triton"), problem)
    tables = [{}, *({key: OTHER} for key in asked)]
    found = []
    for workers in (1, 2):
        with tune.checker(given, workers) as errors:
            found.append(list(errors(tables)))
    assert found[0] == found[1] and len(found[0]) == len(tables) and all(0 < error < 1e-4 for error in found[0])


@pytest.mark.parametrize("text", ["[1]", "{", '{"key": {"block_m": 16}}', '{"key": 3}'])
def test_a_file_that_holds_no_tiles_is_named(text, tmp_path, monkeypatch, fresh):
    (tmp_path / "tiles.json").write_text(text)
    monkeypatch.setenv("ESFT_TILES", str(tmp_path / "tiles.json"))
    with pytest.raises(ValueError, match="ESFT_TILES=.*tiles.json: not a file of tuned tiles"):
        tiles.tuned(CPU)

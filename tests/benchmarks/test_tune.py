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


@pytest.fixture
def fresh():
    tiles.tuned.cache_clear(), tiles.usual_tiles.cache_clear()
    yield
    tiles.tuned.cache_clear(), tiles.usual_tiles.cache_clear()


def timed(monkeypatch, *ratios: float) -> list[int]:
    """Instead of the clock: what follows takes this much of what was before, in turn. Returns the rounds of each."""
    run, given = [], itertools.cycle(ratios)

    def interleaved(tasks, rounds, device):
        for task in tasks.values():
            task()
        run.append(rounds)
        return dict(zip(tasks, ([1.0] * rounds, [next(given)] * rounds), strict=True))

    monkeypatch.setattr(layer, "interleaved", interleaved)
    return run


def test_the_fastest_tiles_are_kept_and_then_used(tmp_path, monkeypatch, fresh):
    out = tmp_path / "tiles.json"
    out.write_text('{"kept": {"block_m": 16, "block_n": 32, "block_k": 32, "num_warps": 4, "num_stages": 1}}')
    monkeypatch.setattr(tune, "variants", lambda first, op, arch: {"other": OTHER})
    monkeypatch.setattr(tune, "near", lambda first: [])
    rounds = timed(monkeypatch, 0.5)
    *rows, whole = tune.run(SMALL, 5, torch.float32, CPU, 2, out)
    found = json.loads(out.read_text())
    assert whole["kernel"] == "all" and whole["step"] == 0.5 and rounds[-1] == 6
    assert len(rows) == len(found) - 1 >= 4 and "kept" in found
    assert all(Tiles(**values) == OTHER for key, values in found.items() if key != "kept")
    assert all(row["step"] == 0.5 and row["tiles"] == str(OTHER) for row in rows)

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
    timed(monkeypatch, 1.0)
    rows = tune.run(SMALL, 5, torch.float32, CPU, 2, tmp_path / "tiles.json")
    assert json.loads((tmp_path / "tiles.json").read_text()) == {}
    assert all(row["step"] == 1 and row["wrong"] == [] for row in rows)


def test_what_is_faster_in_half_of_the_rounds_alone_is_not_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "variants", lambda first, op, arch: {"other": OTHER})
    monkeypatch.setattr(tune, "near", lambda first: [])
    times = [[1.0] * 4, [0.9, 0.9, 1.1, 1.1]]
    monkeypatch.setattr(layer, "interleaved", lambda tasks, rounds, device: dict(zip(tasks, times, strict=True)))
    tune.run(SMALL, 5, torch.float32, CPU, 2, tmp_path / "tiles.json")
    assert json.loads((tmp_path / "tiles.json").read_text()) == {}


def test_what_is_wrong_or_does_not_fit_is_not_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "variants", lambda first, op, arch: {"other": OTHER, "large": replace(OTHER, block_m=32)})
    monkeypatch.setattr(tune, "near", lambda first: [])
    errors = itertools.cycle([float("nan"), None])
    monkeypatch.setattr(tune, "error_of", lambda step, problem, expected: next(errors))
    rounds = timed(monkeypatch, 0.5)
    *rows, _ = tune.run(SMALL, 5, torch.float32, CPU, 2, tmp_path / "tiles.json")
    assert len(rows) >= 4 and rounds == [6]  # the whole step alone
    assert all(row["wrong"] == [str(OTHER)] and row["tiles"] != str(OTHER) for row in rows)


def test_ways_to_load_are_tried_before_the_sizes_of_the_best(tmp_path, monkeypatch):
    described = replace(OTHER, descriptors=True)
    monkeypatch.setattr(tune, "variants", lambda first, op, arch: {"described": described})
    monkeypatch.setattr(tune, "near", lambda first: [replace(first, block_n=32)])
    timed(monkeypatch, 0.5)
    *rows, _ = tune.run(SMALL, 5, torch.float32, CPU, 2, tmp_path / "tiles.json")
    found = json.loads((tmp_path / "tiles.json").read_text())
    assert len(found) >= 4 and all(Tiles(**values) == replace(described, block_n=32) for values in found.values())
    assert all(row["step"] == 0.25 for row in rows)


def test_candidates_are_tiles_that_registers_hold():
    first = choose_tiles("sm_90", torch.bfloat16, "up", 1024, (2816, 2048))
    found = tune.candidates(first, "up", "sm_90")
    assert found[0] == first and len(found) == len(set(found)) > 20
    sizes = ("block_m", "block_n", "block_k", "num_warps", "num_stages")
    assert {sum(getattr(t, s) != getattr(first, s) for s in sizes) for t in tune.near(first)} == {1, 2}
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

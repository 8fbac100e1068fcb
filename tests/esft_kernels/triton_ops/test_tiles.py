import dataclasses
import gzip
import itertools
import json
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest
import torch

from esft_kernels.triton_ops import tiles as module
from esft_kernels.triton_ops.tiles import (
    DTYPES,
    PROCESSORS,
    Op,
    Tiles,
    choose_splits,
    choose_tiles,
    device_arch,
    max_row_tiles,
    splits_for,
    tile_key,
    tile_schedule,
    tiles_for,
)

ARCHS = ("interpreter", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950")


@pytest.mark.parametrize("op", get_args(Op))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arch", ARCHS)
def test_tiles_are_shapes_that_a_matrix_product_lowers(arch, dtype, op):
    for rows in (0, 1, 40, 400, 100_000):
        for features in ((2816, 2048), (100, 36)):
            tiles = choose_tiles(arch, dtype, op, rows, features)
            for size in (tiles.block_m, tiles.block_n, tiles.block_k):
                assert size >= 16 and size & (size - 1) == 0
            assert tiles.num_warps in (4, 8) and tiles.num_stages >= 1 and tiles.group_m >= 1


# What was chosen for the GPUs at hand, as measured there or counted from their registers and shared memory. A change of
# it shows in no result, only in the time: so it is written down twice, and none happens unawares.
BF16, FP32 = torch.bfloat16, torch.float32
EVEN, ODD = (2816, 2048), (2816, 2040)
CHOSEN = {
    # fp32 takes registers: the tiles are the same everywhere
    ("sm_90", FP32, "gemm", 33, EVEN): (64, 64, 16, 8, 2),
    ("sm_80", FP32, "grad", 100_000, EVEN): (64, 32, 16, 8, 2),
    ("gfx942", FP32, "up", 32, EVEN): (16, 64, 16, 8, 2),
    ("sm_90", FP32, "grad", 0, EVEN): (16, 32, 16, 8, 2),
    ("sm_90", FP32, "wgrad", 1, EVEN): (64, 64, 16, 8, 2),
    # and so do rows that start anywhere
    ("sm_90", BF16, "gemm", 33, ODD): (64, 64, 32, 8, 2),
    ("sm_90", BF16, "up", 32, ODD[::-1]): (16, 64, 32, 8, 2),
    ("sm_80", BF16, "grad", 100_000, ODD): (64, 32, 32, 8, 2),
    ("sm_90", BF16, "wgrad", 1, ODD): (64, 64, 32, 8, 2),
    # many rows
    ("sm_90", BF16, "gemm", 128, EVEN): (128, 256, 64, 8, 4),
    ("sm_90", BF16, "up", 768, EVEN): (128, 256, 64, 8, 4),
    ("sm_90", BF16, "grad", 512, EVEN): (128, 128, 128, 8, 3, 8, False, 0, True),
    ("sm_100", BF16, "gemm", 768, EVEN): (128, 128, 64, 8, 3),
    ("sm_103", BF16, "up", 768, EVEN): (128, 128, 64, 8, 3),
    ("sm_100", BF16, "grad", 768, EVEN): (128, 128, 64, 8, 3),
    ("sm_80", BF16, "gemm", 768, EVEN): (128, 128, 64, 8, 3),
    ("sm_80", BF16, "grad", 768, EVEN): (128, 128, 64, 8, 3),
    ("sm_89", BF16, "gemm", 768, EVEN): (128, 128, 32, 8, 3),
    ("sm_120", BF16, "grad", 768, EVEN): (128, 128, 32, 8, 3),
    ("gfx942", BF16, "gemm", 768, EVEN): (128, 128, 64, 8, 2),
    ("gfx950", BF16, "grad", 768, EVEN): (128, 128, 64, 8, 2),
    # fewer
    ("sm_90", BF16, "gemm", 127, EVEN): (64, 128, 64, 4, 3),
    ("sm_90", BF16, "up", 33, EVEN): (64, 128, 64, 4, 3),
    ("sm_90", BF16, "grad", 511, EVEN): (64, 128, 64, 4, 3),
    ("sm_89", BF16, "gemm", 767, EVEN): (64, 128, 64, 4, 3),
    ("gfx942", BF16, "grad", 767, EVEN): (64, 128, 64, 4, 2),
    # and few
    ("sm_90", BF16, "gemm", 32, EVEN): (16, 128, 64, 4, 3),
    ("sm_90", BF16, "up", 32, EVEN): (16, 64, 64, 4, 3),
    ("sm_80", BF16, "grad", 32, EVEN): (16, 64, 64, 4, 3),
    ("gfx950", BF16, "up", 1, EVEN): (16, 64, 64, 4, 2),
    # weight gradients
    ("sm_90", BF16, "wgrad", 768, EVEN): (128, 256, 128, 8, 3),
    ("sm_100", BF16, "wgrad", 768, EVEN): (128, 128, 64, 8, 5),
    ("sm_80", BF16, "wgrad", 768, EVEN): (128, 128, 64, 8, 5),
    ("sm_120", BF16, "wgrad", 768, EVEN): (128, 128, 32, 8, 5),
    ("gfx942", BF16, "wgrad", 768, EVEN): (128, 128, 64, 8, 2),
    # small enough that small tests meet every edge
    ("interpreter", FP32, "gemm", 5, EVEN): (16, 32, 64, 4, 1),
    ("interpreter", BF16, "up", 5, ODD): (16, 32, 64, 4, 1),
    ("interpreter", FP32, "grad", 1000, EVEN): (16, 32, 64, 4, 1),
    ("interpreter", FP32, "wgrad", 5, EVEN): (32, 64, 16, 4, 1),
}


@pytest.mark.parametrize(("question", "answer"), CHOSEN.items(), ids=str)
def test_the_tiles_of_a_gpu_are_those_chosen_for_it(question, answer):
    assert choose_tiles(*question) == Tiles(*answer)


@pytest.mark.parametrize("features", [EVEN, ODD])
@pytest.mark.parametrize("arch", ARCHS)
def test_tiles_depend_on_rows_except_for_weight_gradients_and_not_on_which_16_bits(arch, features):
    for op in get_args(Op):
        found = {choose_tiles(arch, BF16, op, rows, features) for rows in (0, 1, 32, 33, 127, 128, 767, 768, 10**6)}
        assert (len(found) == 1) == (op == "wgrad" or arch == "interpreter")
        for rows in (1, 100, 1000):
            assert choose_tiles(arch, torch.float16, op, rows, features) == choose_tiles(arch, BF16, op, rows, features)


def test_unsupported_dtype_is_named():
    message = "^backend 'triton' computes in bfloat16, float16 or float32, got torch.float64$"
    for arch in ("sm_90", "interpreter"):
        with pytest.raises(ValueError, match=message):
            choose_tiles(arch, torch.float64, "gemm", 128, (64, 64))


def test_a_launch_is_told_of_every_size():
    assert Tiles(1, 2, 3, 4, 5, 6).launch_options() == {
        "BLOCK_M": 1, "BLOCK_N": 2, "BLOCK_K": 3, "num_warps": 4, "num_stages": 5, "GROUP_M": 6,
    }  # fmt: skip
    assert Tiles(1, 2, 3, 4, 5).group_m == 8
    with pytest.raises(dataclasses.FrozenInstanceError):
        Tiles(1, 2, 3, 4, 5).block_m = 2  # pyright: ignore[reportAttributeAccessIssue]


@pytest.fixture
def fresh():
    """Nothing is remembered of files and devices, before and after."""
    module.tuned.cache_clear(), module.usual_tiles.cache_clear(), device_arch.cache_clear()
    yield
    module.tuned.cache_clear(), module.usual_tiles.cache_clear(), device_arch.cache_clear()


def test_cpu_tensors_are_interpreted():
    assert device_arch(torch.device("cpu")) == "interpreter"


def test_a_gpu_is_known_by_its_capability_or_by_amds_name(monkeypatch, fresh):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (device.index, 7))
    assert [device_arch(torch.device("cuda", index)) for index in (9, 12)] == ["sm_97", "sm_127"]
    monkeypatch.setattr(torch.version, "hip", "6.4")
    named = SimpleNamespace(gcnArchName="gfx942:sramecc+:xnack-")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: named if device.index == 3 else None)
    assert device_arch(torch.device("cuda", 3)) == "gfx942"


def test_tuned_tiles_are_found_by_all_that_they_were_tuned_for():
    key = tile_key("sm_90", BF16, "up", 700, (2816, 2048))
    assert key == "sm_90 torch.bfloat16 up 10 2816x2048"  # as the files have it: 512 to 1023 rows take 10 bits
    assert {tile_key("sm_90", BF16, "up", rows, (2816, 2048)) for rows in (512, 1023)} == {key}
    others = [
        ("sm_80", BF16, "up", 700, (2816, 2048)),
        ("sm_90", FP32, "up", 700, (2816, 2048)),
        ("sm_90", BF16, "grad", 700, (2816, 2048)),
        ("sm_90", BF16, "up", 511, (2816, 2048)),
        ("sm_90", BF16, "up", 1024, (2816, 2048)),
        ("sm_90", BF16, "up", 700, (2048, 2816)),
    ]
    assert len({key, *(tile_key(*other) for other in others)}) == 7


def test_tuned_tiles_go_before_the_chosen_ones(tmp_path, monkeypatch, fresh):
    tensor, odd = torch.empty(0), Tiles(16, 64, 32, 4, 1, 3)
    key = tile_key("interpreter", FP32, "up", 5, (12, 8))
    (tmp_path / "tiles.json").write_text(json.dumps({key: dataclasses.asdict(odd)}))
    monkeypatch.setenv("ESFT_TILES", str(tmp_path / "tiles.json"))
    assert module.tuned(torch.device("cpu")) == {key: odd}
    assert tiles_for(tensor, "up", 5, (12, 8)) == odd
    assert tiles_for(tensor, "up", 8, (12, 8)) == Tiles(16, 32, 64, 4, 1)
    assert tiles_for(tensor, "wgrad", 5, (12, 8)) == Tiles(32, 64, 16, 4, 1)
    with pytest.raises(ValueError, match="float64"):
        tiles_for(tensor.double(), "up", 5, (12, 8))


@pytest.mark.parametrize("value", [None, ""])
def test_without_a_file_nothing_is_tuned(value, monkeypatch, fresh):
    monkeypatch.delenv("ESFT_TILES", raising=False)
    if value is not None:
        monkeypatch.setenv("ESFT_TILES", value)
    assert module.tuned(torch.device("cpu")) == {}
    assert tiles_for(torch.empty(0), "up", 5, (12, 8)) == Tiles(16, 32, 64, 4, 1)


def test_a_gpus_own_file_is_found_and_without_one_it_is_said_how_to_make_it(tmp_path, monkeypatch, fresh):
    gpu, odd = torch.device("cuda", 0), Tiles(16, 64, 32, 4, 1, 3)
    monkeypatch.delenv("ESFT_TILES", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", {gpu: "NVIDIA H100/80 GB: HBM3"}.__getitem__)
    monkeypatch.setattr(module, "version", lambda name: f"1.2 of {name}")
    file = tmp_path / "esft" / "tiles" / "NVIDIA-H100-80-GB-HBM3-triton-1.2 of triton.json"
    assert module.tuned_file(gpu) == file
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(module.Path, "home", lambda: tmp_path / "home")
    assert module.tuned_file(gpu) == tmp_path / "home" / ".cache" / file.relative_to(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.warns(UserWarning, match=r"^NVIDIA H100/80 GB: HBM3: no tiles .* `python -m benchmarks tune` .*json$"):
        assert module.tuned(gpu) == {}
    with warnings.catch_warnings(action="error"):
        assert module.tuned(gpu) == {}  # said once
    module.tuned.cache_clear()
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"a key": dataclasses.asdict(odd)}))
    assert module.tuned(gpu) == {"a key": odd}
    module.tuned.cache_clear()
    file.write_text("[")
    with pytest.raises(ValueError, match=rf"^{file}: not a file of tuned tiles \(.+\)$"):
        module.tuned(gpu)
    module.tuned.cache_clear()
    (tmp_path / "other.json").write_text(json.dumps({"another": dataclasses.asdict(odd)}))
    monkeypatch.setenv("ESFT_TILES", str(tmp_path / "other.json"))
    assert module.tuned(gpu) == {"another": odd}


@pytest.mark.parametrize(
    "text", [None, "[1]", "{", '{"key": {"block_m": 16}}', '{"key": 3}', '{"key": {"block_x": 1}}']
)
def test_a_file_that_holds_no_tiles_is_named(text, tmp_path, monkeypatch, fresh):
    path = tmp_path / "mine.json"
    if text is not None:
        path.write_text(text)
    monkeypatch.setenv("ESFT_TILES", str(path))
    with pytest.raises(ValueError, match=r"^ESFT_TILES=.*/mine.json: not a file of tuned tiles \(.+\)$"):
        module.tuned(torch.device("cpu"))


def test_a_kernels_tiles_are_looked_up_once(fresh, monkeypatch):
    tensor, asked, odd = torch.empty(1), [], Tiles(16, 32, 48, 4, 1)
    kept = {tile_key("interpreter", torch.float32, "grad", 5, (48, 32)): odd}
    monkeypatch.setattr(module, "tuned", lambda device: asked.append(device) or kept)
    for _ in range(2):
        assert module.tiles_for(tensor, "grad", 5, (48, 32)) is odd
        assert module.tiles_for(tensor, "up", 5, (48, 32)) == choose_tiles(
            "interpreter", torch.float32, "up", 5, (48, 32)
        )
        assert module.tiles_for(tensor, "up", 5, (48, 32), True).num_stages <= 2
    assert asked == [tensor.device] * 2


@pytest.mark.parametrize(
    ("count", "block", "blocks"), [(0, 4, 0), (1, 4, 1), (4, 4, 1), (5, 4, 2), (8, 4, 2), (7, 1, 7)]
)
def test_blocks_hold_all(count, block, blocks):
    assert module.cdiv(count, block) == blocks


def test_a_power_of_two_is_not_below():
    assert [module.next_power_of_2(count) for count in range(1, 10)] == [1, 2, 4, 4, 8, 8, 8, 8, 16]


@pytest.mark.parametrize("block_m", [1, 4, 16])
@pytest.mark.parametrize(
    "counts", [[], [0], [5], [0, 0, 16, 0], [1] * 9, [4, 8, 0, 3, 16, 17, 0], torch.randint(0, 40, (64,)).tolist()]
)
def test_schedule_covers_every_row_once(counts, block_m):
    offsets = torch.tensor([0, *counts]).cumsum(0)
    position, first = tile_schedule(offsets, block_m)
    assert len(position) == max_row_tiles(sum(counts), len(counts), block_m)
    covered = []
    for e, start in zip(position.tolist(), first.tolist(), strict=True):
        end = int(offsets[e + 1])
        assert start >= int(offsets[e])
        covered += [(e, row) for row in range(start, min(start + block_m, end))]
    assert covered == [(e, row) for e in range(len(counts)) for row in range(int(offsets[e]), int(offsets[e + 1]))]


def test_row_tiles_of_a_stretch_of_positions_start_at_its_first_row():
    offsets = torch.tensor([0, 5, 20, 20, 41])
    position, first = tile_schedule(offsets[1:], 16)
    rows = [(e, start) for e, start in zip(position.tolist(), first.tolist(), strict=True) if start < offsets[e + 2]]
    assert rows == [(0, 5), (2, 20), (2, 36)]


def test_a_schedule_is_of_64_bit_integers_where_the_offsets_are():
    for found in tile_schedule(torch.tensor([0, 5, 20]), 16):
        assert found.dtype == torch.int64 and found.device.type == "cpu"
    assert max_row_tiles(20, 2, 16) == 3  # by the sizes alone: one may be left over, as here


def test_weight_gradients_of_few_tiles_are_split():
    # 132 multiprocessors: as many pieces as still find one each, eight at most.
    splits = {132: 1, 1000: 1, 67: 1, 66: 2, 60: 2, 45: 2, 44: 3, 19: 6, 18: 7, 17: 7, 16: 8, 3: 8, 1: 8, 0: 8}
    assert {programs: choose_splits("sm_90", programs) for programs in splits} == splits


@pytest.mark.parametrize(
    ("arch", "processors"),
    [("sm_80", 108), ("sm_89", 128), ("sm_90", 132), ("sm_100", 148), ("sm_120", 170), ("gfx942", 304), ("gfx950", 256)]
    + [("sm_86", 128)],  # not in the table: about as many as most
)
def test_a_weight_gradient_is_split_where_half_the_processors_would_idle(arch, processors):
    # A100, RTX 4090, H100, B200, RTX 5090, MI300X and MI355X, by their data sheets
    assert PROCESSORS.get(arch, 128) == processors
    assert [choose_splits(arch, processors // 2 + more) for more in (0, 1)] == [2, 1]


def test_the_interpreter_splits_some_and_some_not():
    assert [choose_splits("interpreter", programs) for programs in (0, 8, 9, 1000)] == [2, 2, 1, 1]
    assert [splits_for(torch.empty(0), programs) for programs in (8, 9)] == [2, 1]


PUBLISHED = sorted(Path(__file__).parents[4].glob("shared/esft-official/intent/routing_layer_*.txt.gz"))


@pytest.mark.skipif(not PUBLISHED, reason="the published routing logs are not here")
def test_little_is_padded_on_the_published_routing():
    """Rows that tiles hold beyond an expert's own, of the rows asked for, on the routing of DeepSeek-V2-Lite.

    On sm_90 more, because a row of its large tiles takes less than two thirds of the time of one of the short tiles.
    """
    tokens, top_k, experts = 4096, 6, 64
    for path in PUBLISHED:
        with gzip.open(path, "rt") as lines:  # a sequence's expert ids, six a token, then an empty field and weights
            ids = [int(e) for line in lines for e in line.split("\t\t")[0].split("\t")]
        assert len(ids) >= tokens * top_k
        counts = torch.bincount(torch.tensor(ids[: tokens * top_k]), minlength=experts)
        for arch, op in itertools.product(("sm_80", "sm_90"), ("up", "gemm", "grad")):
            tiles = choose_tiles(arch, torch.bfloat16, op, tokens * top_k // experts, (2816, 2048))
            padding = float((-counts % tiles.block_m).sum()) / (tokens * top_k)
            print(f"{path.name} {arch} {op} {tiles.block_m} rows a tile: {padding:.1%} padding")
            assert padding < {"sm_80": 0.10, "sm_90": 0.20}[arch]


def test_variants_are_those_that_a_gpu_and_an_op_have():
    full, plain = Tiles(128, 256, 64, 8, 3), Tiles(128, 128, 64, 8, 2)
    long = replace(full, block_k=128, num_stages=2, descriptors=True)
    assert module.variants(full, "up", "sm_90") == {
        "descriptors": replace(full, descriptors=True), "long turns": long, "persistent": replace(full, persistent=1),
        "persistent descriptors": replace(full, descriptors=True, persistent=1),
        "persistent long turns": replace(long, persistent=1),
    }  # fmt: skip
    assert module.variants(plain, "gemm", "gfx942") == {"persistent": replace(plain, persistent=1)}
    assert module.variants(plain, "gemm", "sm_89").keys() == {"persistent"}
    assert module.variants(replace(full, block_k=128), "wgrad", "sm_100").keys() == {"descriptors"}
    assert module.variants(plain, "wgrad", "sm_80") == {}
    assert module.variants(replace(plain, num_warps=4), "up", "sm_80")["persistent"].persistent == 2
    grad = module.variants(Tiles(128, 128, 128, 8, 3), "grad", "sm_90")
    assert grad["long turns"] == Tiles(64, 256, 128, 4, 2, descriptors=True)
    assert grad.keys() == {"H ahead", "descriptors", "long turns", "persistent descriptors"}
    assert grad["H ahead"].ahead and not grad["descriptors"].ahead
    ahead = module.variants(grad["H ahead"], "grad", "sm_90")
    assert not ahead["H later"].ahead and ahead["descriptors"].ahead and not ahead["persistent descriptors"].ahead
    assert module.variants(plain, "grad", "sm_80") == {"H ahead": replace(plain, ahead=True)}
    assert module.variants(Tiles(16, 64, 64, 4, 3), "grad", "sm_90")["long turns"].block_n == 64
    assert "long turns" not in module.variants(Tiles(128, 128, 128, 8, 3), "grad", "sm_100")
    assert "descriptors" in module.variants(plain, "grad", "interpreter")


def test_inside_a_variant_every_op_that_has_it_takes_it():
    tensor = torch.empty(1)
    usual = tiles_for(tensor, "up", 5, (48, 32)), tiles_for(tensor, "wgrad", 5, (48, 32))
    with module.varied("persistent"):
        assert tiles_for(tensor, "up", 5, (48, 32)) == replace(usual[0], persistent=2)
        assert tiles_for(tensor, "wgrad", 5, (48, 32)) == usual[1]
    with module.varied("chosen"):
        assert tiles_for(tensor, "up", 5, (48, 32)) == usual[0]


def test_persistent_programs_are_as_many_as_the_processors_hold(monkeypatch):
    tensor, grid = torch.empty(1), Tiles(16, 32, 64, 4, 1)
    assert module.processors(tensor.device) == 3  # so that small tests walk over several tiles
    assert module.programs_for(tensor, grid, 100) == 100
    assert [module.programs_for(tensor, replace(grid, persistent=n), 5) for n in (1, 2)] == [3, 5]
    monkeypatch.setattr(module, "device_arch", lambda device: "sm_100")
    assert module.processors(torch.device("meta")) == 148
    gpu = torch.device("cuda", 1)
    has = {gpu: SimpleNamespace(multi_processor_count=114)}
    monkeypatch.setattr(torch.cuda, "get_device_properties", has.__getitem__)
    assert module.processors(gpu) == 114


def test_tiles_can_be_handed_in_for_a_while(monkeypatch):
    tensor, mine, asked = torch.empty(1), Tiles(16, 32, 64, 4, 1), []
    usual = module.tiles_for(tensor, "up", 5, (48, 32))
    monkeypatch.setattr(module, "tuned", lambda device: 1 / 0)  # what is handed in goes before what was tuned
    with module.chosen_by(lambda *what: asked.append(what) or mine):
        assert module.tiles_for(tensor, "up", 5, (48, 32)) is mine
        with module.chosen_by(lambda *what: usual):
            assert module.tiles_for(tensor, "up", 5, (48, 32)) is usual
        assert module.tiles_for(tensor, "grad", 7, (40, 24)) is mine
    assert asked == [
        ("interpreter", torch.float32, "up", 5, (48, 32)),
        ("interpreter", torch.float32, "grad", 7, (40, 24)),
    ]
    monkeypatch.undo()
    with pytest.raises(ZeroDivisionError), module.chosen_by(lambda *what: mine):
        raise ZeroDivisionError
    assert module.tiles_for(tensor, "up", 5, (48, 32)) == usual


@pytest.mark.parametrize(
    ("dtype", "usual", "decoding"),
    [
        (torch.bfloat16, Tiles(16, 64, 64, 2, 3), Tiles(16, 64, 32, 4, 2)),
        (torch.bfloat16, Tiles(32, 126, 64, 8, 3), Tiles(32, 126, 32, 4, 2)),
        (torch.float16, Tiles(32, 128, 64, 4, 3), Tiles(32, 128, 16, 8, 2)),
        (torch.bfloat16, Tiles(64, 128, 8, 8, 1), Tiles(64, 128, 8, 8, 1)),
        (torch.float32, Tiles(64, 64, 32, 8, 3), Tiles(32, 64, 16, 8, 2)),
        (torch.float32, Tiles(16, 64, 8, 4, 1), Tiles(16, 64, 8, 4, 1)),
    ],
)
def test_turns_that_decode_are_shorter(dtype, usual, decoding):
    tensor = torch.empty(1, dtype=dtype)
    assert module.decoding(usual, dtype) == decoding
    with module.chosen_by(lambda *question: usual):
        assert module.tiles_for(tensor, "up", 5, (48, 32), True) == decoding
        assert module.tiles_for(tensor, "up", 5, (48, 32)) == usual

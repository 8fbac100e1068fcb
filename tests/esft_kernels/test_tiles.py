import gzip
from pathlib import Path
from typing import get_args

import pytest
import torch
from esft_kernels.tiles import (
    DTYPES,
    Op,
    choose_splits,
    choose_tiles,
    device_arch,
    max_row_tiles,
    padded_rows,
    tile_schedule,
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


def test_few_rows_per_expert_get_short_tiles():
    heights = [choose_tiles("sm_90", torch.bfloat16, "gemm", rows, (2816, 2048)).block_m for rows in (8, 100, 4096)]
    assert heights == [16, 64, 128]


def test_unsupported_dtype_is_named():
    with pytest.raises(ValueError, match="float64"):
        choose_tiles("sm_90", torch.float64, "gemm", 128, (64, 64))


def test_cpu_tensors_are_interpreted():
    assert device_arch(torch.device("cpu")) == "interpreter"


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


def test_weight_gradients_of_few_tiles_are_split():
    assert choose_splits("sm_90", 1000) == 1
    assert choose_splits("sm_90", 60) == 2
    assert choose_splits("sm_90", 1) == 8


PUBLISHED = sorted(Path(__file__).parents[3].glob("shared/esft-official/intent/routing_layer_*.txt.gz"))


@pytest.mark.skipif(not PUBLISHED, reason="the published routing logs are not here")
def test_little_is_padded_on_the_published_routing():
    """Rows that tiles hold beyond an expert's own, of the rows asked for, on the routing of DeepSeek-V2-Lite."""
    tokens, top_k, experts = 4096, 6, 64
    for path in PUBLISHED:
        with gzip.open(path, "rt") as lines:  # a sequence's expert ids, six a token, then an empty field and weights
            ids = [int(e) for line in lines for e in line.split("\t\t")[0].split("\t")]
        assert len(ids) >= tokens * top_k
        counts = torch.bincount(torch.tensor(ids[: tokens * top_k]), minlength=experts)
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
        for op in ("up", "gemm", "grad"):
            tiles = choose_tiles("sm_90", torch.bfloat16, op, tokens * top_k // experts, (2816, 2048))
            padding = padded_rows(offsets, tiles.block_m) / (tokens * top_k)
            print(f"{path.name} {op} {tiles.block_m} rows a tile: {padding:.1%} padding")
            assert padding < 0.10

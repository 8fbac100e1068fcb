import pytest
import torch

from esft_kernels.tiles import DTYPES, choose_tiles, device_arch, max_row_tiles, tile_schedule

ARCHS = ("interpreter", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950")


@pytest.mark.parametrize("op", ["gemm", "wgrad"])
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

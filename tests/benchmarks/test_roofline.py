import pytest

from benchmarks.roofline import GPUS, Launch, all_trained, compute, even_rows, ours, unfused
from benchmarks.shapes import SHAPES, LayerShape

SMALL = LayerShape("small", 512, 256, 4, 2)  # multiples of every tile


def test_flops_of_full_tiles_are_those_of_the_layer():
    launch = Launch(SMALL, "sm_90", 2048, (1024,) * 4)
    assert sum(p.flops for p in ours(launch, 1)) == SMALL.flops(2048, 1024)
    assert sum(p.flops for p in all_trained(launch, 1)) == SMALL.flops(2048, 4096)


def test_padding_of_rows_and_of_columns_is_counted():
    full = Launch(SMALL, "sm_90", 2048, (1024,) * 4)
    odd_rows = Launch(SMALL, "sm_90", 2048, (1025, 1023, 1024, 1024))
    tiles = full.tiles("up", 512, 512)
    assert ours(odd_rows, 0)[0].flops - ours(full, 0)[0].flops == 2 * tiles.block_m * 512 * 512
    odd_columns = Launch(LayerShape("odd", 512, 256 + 16, 4, 2), "sm_90", 2048, (1024,) * 4)
    assert ours(odd_columns, 0)[0].flops - ours(full, 0)[0].flops == 2 * 4096 * tiles.block_n * 512


def test_bytes_by_hand():
    d, f, t, n = 512, 256, 2048, 4096
    passes = {p.name: p.bytes for p in ours(Launch(SMALL, "sm_90", t, (1024,) * 4), 1)}
    assert passes["combine"] == 2 * (n * d + t * d)
    assert passes["up"] == 2 * (n * d + 4 * 2 * f * d + n * 3 * f)  # X, weights of a group each, H and A
    assert passes["dW down"] == 2 * (1024 * (d + f) + d * f)


@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
def test_fewer_bytes_and_flops_than_the_other_schedules(gpu):
    shape = SHAPES["deepseek-v2-lite"]
    launch = Launch(shape, gpu.arch, 4096, even_rows(shape, 4096, 5, 0.22))
    mine, every, scatter = (make(launch, 5) for make in (ours, all_trained, unfused))
    for total in (lambda passes: sum(p.flops for p in passes), lambda passes: sum(p.bytes for p in passes)):
        assert total(mine) < total(every) <= total(scatter)


def test_rows_add_up():
    rows = even_rows(SHAPES["deepseek-v2-lite"], 1000, 5, 0.22)
    assert len(rows) == 64 and sum(rows) == 6000 and sum(rows[:5]) == 1320


def test_every_gpu_has_a_row_marked_as_computed():
    table = compute(SHAPES["deepseek-v2-lite"], 4096, 5, 0.22)
    assert [row["GPU"] for row in table] == list(GPUS)
    assert all("(computed)" in key for key in table[0] if key.endswith("ms") or " ms" in key)

from dataclasses import replace

import pytest
import torch

from esft_kernels.backends import reference

pytest.importorskip("triton")
from esft_kernels.triton_ops import grouped_gemm as op
from esft_kernels.triton_ops.grouped_gemm import grouped_gemm
from esft_kernels.triton_ops.tiles import choose_tiles, chosen_by
from tests.esft_kernels.bounds import Watched, check_bounds, poison_masked
from tests.esft_kernels.layers import TOLERANCE, assert_close, poison_empty

COUNTS = [17, 0, 16, 5, 1, 33]  # two tiles, none, exactly one, part of one, one row, three tiles
N = sum(COUNTS)


@pytest.fixture(autouse=True)
def _strict(monkeypatch):
    poison_empty(monkeypatch)
    poison_masked(monkeypatch)
    check_bounds(monkeypatch)


def expected(rows, slot, trained, frozen, offsets, weights=None, biases=(None, None)):
    both = torch.cat([trained, frozen]).double()
    bias = None if biases[0] is None else torch.cat(biases).double()
    by_row = reference.grouped_gemm(
        rows.double(), lambda e: both[e], offsets.tolist(), both.shape[1], None if bias is None else lambda e: bias[e]
    )
    out = torch.full_like(by_row, float("nan"))
    out[slot] = by_row
    return out if weights is None else out * weights.double().reshape(-1, 1)


@pytest.mark.parametrize(
    ("dtype", "weighted", "transposed"),
    [
        (torch.float32, False, False), (torch.float32, True, True), (torch.float32, True, False),
        (torch.bfloat16, True, False), (torch.bfloat16, False, True), (torch.float16, True, False),
        (torch.float16, False, True),
    ],
)  # fmt: skip
def test_matches_reference(dtype, weighted, transposed):
    offsets, slot = torch.tensor([0, *COUNTS]).cumsum(0), torch.randperm(N)
    out_features, in_features, s = 37, 71, 2
    shape = (len(COUNTS), in_features, out_features) if transposed else (len(COUNTS), out_features, in_features)
    weights = torch.randn(shape).to(dtype)
    trained, frozen = weights[:s].clone(), weights[s:].clone()
    if transposed:
        trained, frozen = trained.mT, frozen.mT
    rows = torch.randn(N, in_features).to(dtype)
    extra = {}
    if weighted:
        bias = torch.randn(len(COUNTS), out_features).to(dtype)
        extra = {"weights_TK": torch.rand(N // 3, 3), "biases": (bias[:s].clone(), bias[s:].clone())}
    out = grouped_gemm(rows, slot, trained, frozen, offsets, **extra)
    assert out.dtype == dtype
    assert_close(out, expected(rows, slot, trained, frozen, offsets, *extra.values()), TOLERANCE[dtype])


@pytest.mark.parametrize("features", [16, 37, 96])
def test_paired_columns_meet_the_rows_of_weights_with_all_gates_first(features):
    offsets, slot = torch.tensor([0, *COUNTS]).cumsum(0), torch.randperm(N)
    weights = torch.randn(len(COUNTS), 2 * features, 40)  # gate_up: the input gradient goes through its transpose
    rows = torch.randn(N, 2 * features)  # all gates first
    paired = rows.view(N, 2, features).transpose(1, 2).reshape(N, 2 * features)
    out = grouped_gemm(paired, slot, weights[:2].mT, weights[2:].mT, offsets, paired=True)
    assert_close(out, expected(rows, slot, weights[:2].mT, weights[2:].mT, offsets), TOLERANCE[torch.float32])


@pytest.mark.parametrize("s", [0, 6])
def test_one_pool_may_be_empty(s):
    offsets, slot = torch.tensor([0, *COUNTS]).cumsum(0), torch.randperm(N)
    rows, weights = torch.randn(N, 20), torch.randn(6, 33, 20)
    out = grouped_gemm(rows, slot, weights[:s], weights[s:], offsets)
    assert_close(out, expected(rows, slot, weights[:s], weights[s:], offsets), TOLERANCE[torch.float32])


def test_rows_past_the_last_position_are_neither_read_nor_written():
    offsets, slot = torch.tensor([0, 17, 17, 40]), torch.randperm(40)
    rows, trained, frozen = torch.randn(40, 20), torch.randn(2, 33, 20), torch.full((1, 33, 20), float("nan"))
    rows[17:] = float("nan")
    out = grouped_gemm(rows, slot, trained, frozen, offsets[:3])
    exact = expected(rows, slot, trained, frozen, offsets[:3])
    assert_close(out[slot[:17]], exact[slot[:17]], TOLERANCE[torch.float32])
    assert out[slot[17:]].isnan().all()


@pytest.mark.parametrize("positions", [0, 3])
def test_no_rows(positions):
    offsets, none = torch.zeros(positions + 1, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
    out = grouped_gemm(torch.randn(0, 20), none, torch.randn(positions, 33, 20), torch.randn(0, 33, 20), offsets)
    assert out.shape == (0, 33)


@pytest.mark.parametrize("s", [0, 3])
def test_one_pool_may_be_empty_and_the_weights_transposed(s):
    offsets, slot = torch.tensor([0, 4, 4, 9]), torch.randperm(9)
    rows, weights = torch.randn(9, 20), torch.randn(3, 20, 33)
    trained, frozen = (weights.mT, torch.empty(0, 33, 20)) if s else (torch.empty(0, 33, 20), weights.mT)
    out = grouped_gemm(rows, slot, trained, frozen, offsets)
    assert_close(out, expected(rows, slot, trained, frozen, offsets), TOLERANCE[torch.float32])


# Blocks are 16 rows, 32 columns and 64 input features here: a block and one more, less than one, and whole ones.
@pytest.mark.parametrize(("out_features", "in_features"), [(33, 65), (9, 20), (33, 64), (32, 66), (64, 128)])
@pytest.mark.parametrize("pools", [(2, 1), (3, 0), (0, 3)])
@pytest.mark.parametrize("persistent", [0, 1])  # a program a tile; three that take turns
def test_nothing_outside_the_tensors_is_touched_at_any_size_and_nothing_twice(
    out_features, in_features, pools, persistent
):
    offsets, slot = torch.tensor([0, 5, 5, 7]), torch.randperm(7)
    trained, frozen = torch.randn(3, out_features, in_features).split(pools)
    biases = torch.randn(3, out_features).split(pools)
    rows, weights = torch.randn(7, in_features), torch.rand(7, 1)
    with chosen_by(lambda *asked: replace(choose_tiles(*asked), persistent=persistent)):
        out = grouped_gemm(rows, slot, trained, frozen, offsets, weights, biases)
    assert_close(out, expected(rows, slot, trained, frozen, offsets, weights, biases), TOLERANCE[torch.float32])


@pytest.mark.parametrize("positions", [1, 3])
def test_tiles_are_for_the_rows_of_an_expert(positions, monkeypatch):
    asked = []
    real = op.tiles_for
    monkeypatch.setattr(op, "tiles_for", lambda tensor, *args: asked.append(args) or real(tensor, *args))
    offsets, slot = torch.tensor([0, 2, 2, 7][-positions - 1 :]), torch.arange(7)
    grouped_gemm(torch.randn(7, 20), slot, torch.randn(positions, 33, 20), torch.randn(0, 33, 20), offsets)
    assert asked == [("gemm", 7 // positions, (33, 20), False)]


@pytest.mark.parametrize("out_features", [24, 32, 33])  # a tile has 32
@pytest.mark.parametrize("in_features", [65, 64])  # a step has 64
def test_masks_are_left_out_only_where_every_tile_is_whole(in_features, out_features, monkeypatch):
    monkeypatch.setattr(op, "_grouped_gemm_kernel", kernel := Watched())
    weights = torch.randn(2, out_features, in_features)
    grouped_gemm(torch.randn(5, in_features), torch.arange(5), weights, weights[:0], torch.tensor([0, 2, 5]))
    assert kernel.constants["EVEN_N"] == (out_features == 32) and kernel.constants["EVEN_K"] == (in_features == 64)


@pytest.mark.parametrize("descriptors", [False, True])
@pytest.mark.parametrize("in_features", [20, 21])  # rows of whole 16 bytes, or not
def test_descriptors_load_weights_and_rows_where_they_are_asked_for_and_can(in_features, descriptors, monkeypatch):
    monkeypatch.setattr(op, "_grouped_gemm_kernel", kernel := Watched())
    weights, rows = torch.randn(2, 12, in_features), torch.randn(5, in_features)
    with chosen_by(lambda *asked: replace(choose_tiles(*asked), descriptors=descriptors, persistent=2)):
        grouped_gemm(rows, torch.arange(5), weights, weights[:0], torch.tensor([0, 2, 5]))
    can = descriptors and in_features == 20
    assert kernel.constants["LAYOUT"] == ("out_in" if can else None) and kernel.constants["ROW_TILES"] == can
    assert kernel.constants["PERSISTENT"] and kernel.grid == (2,)  # as many as there are tiles


def test_rows_that_descriptors_cannot_load_stay_with_pointers(monkeypatch):
    monkeypatch.setattr(op, "_grouped_gemm_kernel", kernel := Watched())
    weights, rows = torch.randn(2, 21, 12).mT, torch.randn(5, 21)
    with chosen_by(lambda *asked: replace(choose_tiles(*asked), descriptors=True)):
        grouped_gemm(rows, torch.arange(5), weights, weights[:0], torch.tensor([0, 2, 5]))
    assert kernel.constants["LAYOUT"] == "in_out" and not kernel.constants["ROW_TILES"]
    assert not kernel.constants["PERSISTENT"]

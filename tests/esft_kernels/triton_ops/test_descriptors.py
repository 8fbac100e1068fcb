import threading

import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl
from triton.runtime import _allocation

from esft_kernels.triton_ops import descriptors
from esft_kernels.triton_ops.descriptors import (
    aligned,
    launch,
    load_weight_tile,
    rows_descriptor,
    weight_descriptor,
    weight_layout,
)
from tests.esft_kernels.bounds import check_bounds, poison_masked


@triton.jit
def _weight_tile(
    weight_ptr, out_ptr, out_features, in_features, stride_out, stride_in, column, k,
    LAYOUT: tl.constexpr, PAIRED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tiles = weight_descriptor(
        weight_ptr, out_features, in_features, stride_out, stride_in, LAYOUT, PAIRED, BLOCK_N, BLOCK_K
    )
    tile_KN = load_weight_tile(tiles, column, k, LAYOUT, PAIRED, BLOCK_N, BLOCK_K)
    tl.store(out_ptr + tl.arange(0, BLOCK_K)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :], tile_KN)


@pytest.mark.parametrize(("column", "k"), [(0, 0), (16, 8), (32, 16)])  # the last reach past the features
@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("layout", ["out_in", "in_out"])
def test_a_tile_of_weights_whatever_their_order(layout, paired, column, k, monkeypatch):
    """40 output and 24 input features, which gates and ups take turns in; in memory all gates come first."""
    check_bounds(monkeypatch)
    wanted = torch.randn(40, 24)
    stored = wanted if layout == "out_in" else wanted.T
    if paired:
        stored = torch.cat([stored[0::2], stored[1::2]])
    stored = stored.contiguous()
    strides = stored.stride() if layout == "out_in" else stored.stride()[::-1]
    found = torch.empty(8, 16)
    _weight_tile[(1,)](stored, found, 40, 24, *strides, column, k, LAYOUT=layout, PAIRED=paired, BLOCK_N=16, BLOCK_K=8)
    padded = torch.zeros(64, 64)
    padded[:40, :24] = wanted
    assert torch.equal(found, padded[column : column + 16, k : k + 8].T)


@triton.jit
def _rows(rows_ptr, end_ptr, out_ptr, features, first):
    tiles = rows_descriptor(rows_ptr, tl.load(end_ptr), features, 4, 8)
    tl.store(out_ptr + tl.arange(0, 4)[:, None] * 8 + tl.arange(0, 8)[None, :], tiles.load([first, 8]))


def test_rows_are_zero_from_their_end_on(monkeypatch):
    check_bounds(monkeypatch)
    rows, found = torch.randn(9, 12), torch.empty(4, 8)
    _rows[(1,)](rows, torch.tensor([5]), found, 12, 3)
    expected = torch.zeros(4, 8)
    expected[:2, :4] = rows[3:5, 8:]
    assert torch.equal(found, expected)


def test_what_a_descriptor_leaves_out_is_zero_where_masked_loads_are_poisoned(monkeypatch):
    poison_masked(monkeypatch)
    test_rows_are_zero_from_their_end_on(monkeypatch)


WEIGHTS = torch.zeros(3, 16, 24, dtype=torch.bfloat16)
NONE = WEIGHTS[:0]


def test_the_rows_of_a_matrix_are_the_features_that_are_apart():
    assert weight_layout(WEIGHTS, WEIGHTS, None) == weight_layout(NONE, WEIGHTS, None) == "out_in"
    assert weight_layout(WEIGHTS.mT, NONE, None) == weight_layout(NONE.mT, WEIGHTS.mT, None) == "in_out"
    assert weight_layout(NONE, NONE, None) is None


def test_gates_and_ups_can_take_turns_where_they_are_rows():
    assert weight_layout(WEIGHTS, WEIGHTS, "out") == "out_in" and weight_layout(WEIGHTS.mT, NONE.mT, "in") == "in_out"
    assert weight_layout(WEIGHTS, WEIGHTS, "in") is None and weight_layout(WEIGHTS.mT, NONE.mT, "out") is None


def test_every_row_of_every_expert_starts_at_16_bytes():
    flat = torch.zeros(4000, dtype=torch.bfloat16)
    assert aligned(flat[8:].as_strided((3, 4, 8), (40, 8, 1)))
    assert not aligned(flat[4:].as_strided((3, 4, 8), (40, 8, 1)))  # the first one
    assert not aligned(flat.as_strided((3, 4, 8), (36, 8, 1)))  # an expert
    assert not aligned(flat.as_strided((3, 4, 8), (40, 12, 1)))  # a row
    assert not aligned(flat.as_strided((3, 4, 8), (64, 16, 2)))
    assert aligned(flat.float().as_strided((3, 4, 8), (36, 12, 1)))
    odd = torch.zeros(2, 16, 12, dtype=torch.bfloat16)
    assert weight_layout(odd, odd, None) is None and weight_layout(WEIGHTS, odd, None) is None


def test_a_launch_has_memory_for_descriptors_in_any_thread_and_leaves_the_callers_allocator(monkeypatch):
    asked, seen = [], []
    monkeypatch.setattr(torch, "empty", lambda size, **kwargs: asked.append((size, kwargs)) or "memory")

    def kernel(*args, **options):
        seen.append((args, options, _allocation._allocator.get()(128, 16, None)))

    before = _allocation._allocator.get()
    launch(kernel, True, 1, 2, BLOCK=3)
    thread = threading.Thread(target=launch, args=(kernel, True, 1, 2), kwargs={"BLOCK": 3})  # as autograd's
    thread.start()
    thread.join()
    assert seen == [((1, 2), {"BLOCK": 3}, "memory")] * 2
    assert asked == [(128, {"dtype": torch.int8, "device": "cuda"})] * 2
    assert _allocation._allocator.get() is before
    assert descriptors.ALIGNMENT == 16


def test_a_launch_without_descriptors_leaves_even_its_own_context_alone():
    seen = []
    launch(lambda *args, **options: seen.append((args, options, _allocation._allocator.get())), False, 1, 2, BLOCK=3)
    assert seen == [((1, 2), {"BLOCK": 3}, _allocation._allocator.get())]

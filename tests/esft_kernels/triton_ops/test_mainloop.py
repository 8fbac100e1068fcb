import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl
from triton.runtime import interpreter

from esft_kernels.triton_ops import tiles
from esft_kernels.triton_ops.mainloop import (
    block_of,
    count_tiles,
    dot,
    expert_of,
    find_row_tile,
    find_tile,
    halves,
    multiply,
    precision,
    row_offsets,
    weight_row,
    wide,
)
from tests.esft_kernels.bounds import check_bounds, poison_masked
from tests.esft_kernels.layers import TOLERANCE, assert_close

COUNTS = [[], [0], [5], [0, 0, 16, 0], [1] * 9, [4, 8, 0, 3, 16, 17, 0]]


@triton.jit
def _row_tiles(offsets_ptr, out_ptr, num_positions, BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr):
    tile = tl.program_id(0)
    position, first, end = find_row_tile(tile, offsets_ptr, num_positions, BLOCK_M, BLOCK_P)
    tl.store(out_ptr + 3 * tile, position)
    tl.store(out_ptr + 3 * tile + 1, first)
    tl.store(out_ptr + 3 * tile + 2, end)


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("before", [0, 7, 21])  # a stretch of offsets begins where it begins
def test_row_tiles_cover_every_row_of_every_expert_once(counts, before, monkeypatch):
    block = 4
    offsets = torch.tensor([before, *counts, 3, 50]).cumsum(0)[: len(counts) + 1]  # other experts' follow in memory
    expected = [
        (e, first, int(end))
        for e, (start, end) in enumerate(zip(offsets, offsets[1:], strict=False))
        for first in range(int(start), int(end), block)
    ]
    check_bounds(monkeypatch)
    poison_masked(monkeypatch)
    position, first = tiles.tile_schedule(offsets, block)
    beyond = len(position) + 20  # more than a block of positions
    found = torch.full((beyond, 3), -1)
    _row_tiles[(beyond,)](offsets, found, len(counts), BLOCK_M=block, BLOCK_P=16)
    assert [tuple(row) for row in found.tolist() if row[1] < row[2]] == expected
    planned = int(offsets[-1]) // block - before // block + len(counts)
    assert torch.equal(found[:planned, 0], position[:planned]) and torch.equal(found[:planned, 1], first[:planned])
    assert (found[planned:, 0] == len(counts)).all() and (found[planned:, 2] == 0).all()


def test_every_position_of_a_full_block_is_found():
    offsets, found = torch.arange(17), torch.full((32, 3), -1)
    _row_tiles[(32,)](offsets, found, 16, BLOCK_M=1, BLOCK_P=16)
    assert sorted(row for row in found.tolist() if row[1] < row[2]) == [[e, e, e + 1] for e in range(16)]


@triton.jit
def _tiles(
    offsets_ptr, out_ptr, columns, num_positions,
    GROUP_M: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    position, first, end, n_tile = find_tile(
        tl.program_id(0), tl.num_programs(0), columns, offsets_ptr, num_positions, GROUP_M, BLOCK_M, BLOCK_N, BLOCK_P
    )
    out_ptr += 4 * tl.program_id(0)
    tl.store(out_ptr, position)
    tl.store(out_ptr + 1, first)
    tl.store(out_ptr + 2, end)
    tl.store(out_ptr + 3, n_tile)


@pytest.mark.parametrize("columns", [31, 32, 33, 70])
def test_tiles_cover_every_row_and_column_once(columns):
    offsets = torch.tensor([0, 4, 12, 12, 15, 31, 48, 48])
    n_tiles = -(-columns // 32)
    programs = (48 // 4 + 7) * n_tiles
    found = torch.full((programs, 4), -1)
    _tiles[(programs,)](offsets, found, columns, 7, GROUP_M=3, BLOCK_M=4, BLOCK_N=32, BLOCK_P=8)
    expected = [
        [e, first, end, n]
        for e, (start, end) in enumerate(zip(offsets.tolist(), offsets.tolist()[1:], strict=False))
        for first in range(start, end, 4)
        for n in range(n_tiles)
    ]
    assert sorted(row for row in found.tolist() if row[1] < row[2]) == expected


@triton.jit
def _count(offsets_ptr, out_ptr, columns, num_positions, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    tl.store(out_ptr, count_tiles(columns, offsets_ptr, num_positions, BLOCK_M, BLOCK_N))


@pytest.mark.parametrize("columns", [32, 33])
@pytest.mark.parametrize("before", [0, 7, 21])
@pytest.mark.parametrize("counts", COUNTS)
def test_the_tiles_of_a_schedule_are_counted(counts, before, columns):
    offsets, found = torch.tensor([before, *counts]).cumsum(0), torch.zeros(1, dtype=torch.int64)
    _count[(1,)](offsets, found, columns, len(counts), BLOCK_M=4, BLOCK_N=32)
    planned = int(offsets[-1]) // 4 - before // 4 + len(counts)
    assert found.item() == planned * -(-columns // 32)


def test_a_group_of_row_tiles_goes_through_the_columns_together():
    found = torch.full((18, 4), -1)  # five row tiles and an empty one, three column tiles
    _tiles[(18,)](torch.tensor([0, 20]), found, 96, 1, GROUP_M=2, BLOCK_M=4, BLOCK_N=32, BLOCK_P=8)
    expected = [(4 * m, n) for group in (0, 2, 4) for n in range(3) for m in (group, group + 1)]
    assert [(first, n) for _, first, _, n in found.tolist()] == expected


@triton.jit
def _expert(trained_ptr, frozen_ptr, out_ptr, num_trained, stride_expert):
    position = tl.program_id(0)
    address = expert_of(trained_ptr, frozen_ptr, position, num_trained, stride_expert).to(tl.int64)
    tl.store(out_ptr + position, address)


@pytest.mark.parametrize("num_trained", [0, 3, 6])
@pytest.mark.parametrize("stride", [40, 2**30])  # the second passes 32 bits at the third expert of a pool
def test_where_an_experts_weights_begin(num_trained, stride):
    trained, frozen, out = torch.zeros(2), torch.zeros(2), torch.zeros(6, dtype=torch.int64)
    _expert[(6,)](trained, frozen, out, num_trained, stride)
    assert out.tolist() == [
        trained.data_ptr() + p * stride * 4 if p < num_trained else frozen.data_ptr() + (p - num_trained) * stride * 4
        for p in range(6)
    ]


@triton.jit
def _weight_rows(out_ptr, features, PAIRED: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    tl.store(out_ptr + column, weight_row(column, features, PAIRED))


def test_the_row_of_the_weights_that_makes_a_column():
    out = torch.zeros(8, dtype=torch.int64)
    _weight_rows[(1,)](out, 4, PAIRED=True, BLOCK=8)
    assert out.tolist() == [0, 4, 1, 5, 2, 6, 3, 7]  # gates are rows 0 to 3, ups rows 4 to 7
    _weight_rows[(1,)](out, 4, PAIRED=False, BLOCK=8)
    assert out.tolist() == list(range(8))


@triton.jit
def _row_offsets(row_ptr, out_ptr, bits_ptr, features, WIDE: tl.constexpr):
    m_M, k_K = tl.arange(0, 4), tl.arange(0, 2)
    offset_MK = row_offsets(tl.load(row_ptr + m_M), k_K, features, WIDE)
    tl.store(out_ptr + m_M[:, None] * 2 + k_K[None, :], offset_MK)
    tl.store(bits_ptr, offset_MK.dtype.primitive_bitwidth)


@pytest.mark.parametrize(("wide", "rows", "bits"), [(False, [3, 0, 2, 7], 32), (True, [3, 2**26, 0, 2**40], 64)])
def test_offsets_of_whole_rows_are_as_wide_as_they_must_be(wide, rows, bits):
    out, found = torch.zeros(4, 2, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    _row_offsets[(1,)](torch.tensor(rows), out, found, 100, WIDE=wide)
    assert out.tolist() == [[row * 100, row * 100 + 1] for row in rows] and found.tolist() == [bits]


def test_64_bit_offsets_from_the_first_element_that_32_bits_do_not_reach():
    assert not wide(torch.empty(2**20, 2047, device="meta"))
    assert not wide(torch.empty(2**31 - 1, device="meta"))
    assert wide(torch.empty(8, device="meta"), torch.empty(2**20, 2048, device="meta"))
    assert wide(torch.empty(2**20, 2048, device="meta"), torch.empty(8, device="meta"))


@triton.jit
def _product(
    rows_ptr, weight_ptr, out_ptr, out_features, in_features, stride_row, stride_out, stride_in,
    LAYOUT: tl.constexpr, ROW_TILES: tl.constexpr, PRECISION: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    m_M, n_N, k_K = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    row_tiles = None
    if ROW_TILES:
        row_tiles = tl.make_tensor_descriptor(rows_ptr, [4, in_features], [stride_row, 1], [BLOCK_M, BLOCK_K])
    acc_MN = multiply(
        rows_ptr, m_M[:, None] * stride_row + k_K[None, :], row_tiles, 0,
        weight_ptr, n_N[None, :], k_K[:, None], BLOCK_K, (n_N < out_features)[None, :], 0, out_features,
        in_features, stride_out, stride_in, None, 0, None, 0, "plain", False, LAYOUT, False, PRECISION, EVEN_N, EVEN_K,
        BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    tl.store(out_ptr + m_M[:, None] * BLOCK_N + n_N[None, :], acc_MN)


@pytest.mark.parametrize("described", ["nothing", "weights", "both"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("out_features", "in_features"), [(16, 24), (16, 21), (11, 24), (11, 21), (11, 3), (15, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_product_reads_only_its_features(dtype, out_features, in_features, transposed, described, monkeypatch):
    stride = (out_features + 15) // 8 * 8, (in_features + 15) // 8 * 8  # descriptors want 16 bytes
    rows = torch.full((4, stride[1]), float("nan"), dtype=dtype)
    weight = torch.full(stride, float("nan"), dtype=dtype)
    rows[:, :in_features] = torch.randn(4, in_features)
    weight[:out_features, :in_features] = torch.randn(out_features, in_features)
    if transposed:
        weight = weight.mT.contiguous().mT
    poison_masked(monkeypatch)
    check_bounds(monkeypatch)
    out = torch.full((4, 16), float("nan"))
    _product[(1,)](
        rows, weight, out, out_features, in_features, rows.stride(0), *weight.stride(),
        LAYOUT=None if described == "nothing" else "in_out" if transposed else "out_in",
        ROW_TILES=described == "both", PRECISION="cast",
        EVEN_N=out_features == 16, EVEN_K=in_features % 8 == 0, BLOCK_M=4, BLOCK_N=16, BLOCK_K=8,
    )  # fmt: skip
    expected = rows[:, :in_features].double() @ weight[:out_features, :in_features].double().T
    assert_close(out[:, :out_features], expected, TOLERANCE[torch.float32])  # products of 16-bit values are exact
    assert not out[:, out_features:].any()


@triton.jit
def _dot(a_ptr, b_ptr, acc_ptr, PRECISION: tl.constexpr):
    m_M, k_K = tl.arange(0, 2), tl.arange(0, 4)
    acc_MN = tl.load(acc_ptr + m_M[:, None] * 2 + m_M[None, :])
    a_MK, b_KN = tl.load(a_ptr + m_M[:, None] * 4 + k_K[None, :]), tl.load(b_ptr + k_K[:, None] * 2 + m_M[None, :])
    tl.store(acc_ptr + m_M[:, None] * 2 + m_M[None, :], dot(a_MK, b_KN, acc_MN, PRECISION))


@pytest.mark.parametrize(
    ("dtype", "setting", "taken"),
    [
        (torch.bfloat16, "cast", ("fp32", "IEEE")),
        (torch.float16, "cast", ("fp32", "IEEE")),
        (torch.float16, "ieee", ("fp16", "IEEE")),
        (torch.float32, "ieee", ("fp32", "IEEE")),
        (torch.float32, "tf32", ("fp32", "TF32")),
    ],
)
def test_products_are_added_to_the_sum_so_far_in_the_precision_asked_for(dtype, setting, taken, monkeypatch):
    asked = []
    real = interpreter.InterpreterBuilder.create_dot

    def create_dot(self, a, b, d, input_precision, *args):
        asked.append((str(a.dtype.scalar), str(b.dtype.scalar), input_precision.name))
        return real(self, a, b, d, input_precision, *args)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
    a, b, acc = torch.randn(2, 4).to(dtype), torch.randn(4, 2).to(dtype), torch.randn(2, 2)
    expected = acc.double() + a.double() @ b.double()
    _dot[(1,)](a, b, acc, PRECISION=setting)
    assert_close(acc, expected, TOLERANCE[dtype if setting == "ieee" else torch.float32])
    assert asked == [(taken[0], *taken)]


@triton.jit
def _halves(x_ptr, left_ptr, right_ptr):
    m_M, n_N, half_N = tl.arange(0, 2)[:, None], tl.arange(0, 8)[None, :], tl.arange(0, 4)[None, :]
    left_MN, right_MN = halves(tl.load(x_ptr + m_M * 8 + n_N), 2, 8)
    tl.store(left_ptr + m_M * 4 + half_N, left_MN)
    tl.store(right_ptr + m_M * 4 + half_N, right_MN)


def test_halves_are_the_left_and_the_right_columns():
    x, left, right = torch.arange(16.0).view(2, 8), torch.zeros(2, 4), torch.zeros(2, 4)
    _halves[(1,)](x, left, right)
    assert torch.equal(left, x[:, :4]) and torch.equal(right, x[:, 4:])


@pytest.mark.parametrize("arch", ["sm_90", "gfx942", "gfx950"])
@pytest.mark.parametrize(("setting", "allowed"), [("ieee", False), ("tf32", True)])
def test_tf32_only_where_it_is_allowed_and_exists(setting, allowed, arch, monkeypatch):
    monkeypatch.setattr(tiles, "device_arch", lambda device: arch)
    single, half = torch.empty(1, device="meta"), torch.empty(1, device="meta", dtype=torch.bfloat16)
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = setting
    try:
        assert precision(single) == ("tf32" if allowed and arch != "gfx950" else "ieee") and precision(half) == "ieee"
        assert precision(torch.empty(1)) == "cast"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_operands_are_cast_in_the_interpreter():
    assert {precision(torch.empty(1, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16)} == {"cast"}


def test_blocks_of_positions():
    assert [block_of(n) for n in (0, 1, 256, 257, 512, 513)] == [256, 256, 256, 512, 512, 1024]

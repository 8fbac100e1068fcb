import pytest
import torch

from esft_kernels.backends import reference

pytest.importorskip("triton")
from esft_kernels.triton_ops import combine as op
from tests.esft_kernels.bounds import check_bounds, poison_masked, sparse
from tests.esft_kernels.layers import TOLERANCE, assert_close, poison_empty


@pytest.fixture(autouse=True)
def _strict(monkeypatch):
    poison_empty(monkeypatch)
    poison_masked(monkeypatch)
    check_bounds(monkeypatch)


@pytest.mark.parametrize("max_block", [16, 1024])
@pytest.mark.parametrize("top_k", [1, 3, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_matches_reference(dtype, top_k, max_block, monkeypatch):
    monkeypatch.setattr(op, "_MAX_BLOCK", max_block)
    y = torch.randn(7, top_k, 37).to(dtype)
    row, end = torch.randperm(7 * top_k).view(7, top_k), 7 * top_k - 3
    nobody = row >= end
    out = op.combine(y.masked_fill(nobody[:, :, None], float("nan")), row, torch.tensor([0, 2, end]))
    assert out.dtype == dtype
    assert_close(out, reference.combine(y.masked_fill(nobody[:, :, None], 0).double()), TOLERANCE[dtype])


def test_no_token():
    assert op.combine(torch.randn(0, 2, 8), torch.empty(0, 2, dtype=torch.int64), torch.tensor([0])).shape == (0, 8)


@pytest.mark.parametrize("features", [1, 16, 17, 1023, 1024, 1025])  # one block has 1024 at most
def test_sizes(features):
    y = torch.randn(2, 3, features)
    out = op.combine(y, torch.arange(6).view(2, 3), torch.tensor([6]))
    assert_close(out, y.double().sum(1), TOLERANCE[torch.float32])


def test_slots_are_added_in_order_and_in_float32():
    # In fp16, 2049 is not there: 2048 + 1 + 1 + 1 would stay 2048. And in another order, 1e8 - 1e8 + 1 is nothing.
    half = torch.tensor([2048.0, 1.0, 1.0, 2.0]).half().view(1, 4, 1)
    assert op.combine(half, torch.arange(4).view(1, 4), torch.tensor([4])).item() == 2052
    single = torch.tensor([1e8, -1e8, 1.0]).view(1, 3, 1)
    assert op.combine(single, torch.arange(3).view(1, 3), torch.tensor([3])).item() == 1
    assert op.combine(single.flip(1), torch.arange(3).view(1, 3), torch.tensor([3])).item() == 0


def test_a_token_of_no_expert_here_gets_zeros():
    y, rows = torch.full((2, 2, 5), float("nan")), torch.tensor([[0, 1], [2, 3]])
    y[0] = torch.tensor([[1.0], [2.0]])
    assert op.combine(y, rows, torch.tensor([0, 1, 2])).tolist() == [[3.0] * 5, [0.0] * 5]


class FirstColumns:
    """A kernel that is launched for its first block of columns alone."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return self.kernel[(grid[0], 1)]


@pytest.mark.parametrize("top_k", [1, 3])
def test_a_token_past_what_32_bit_offsets_reach(top_k, tmp_path, monkeypatch):
    """The third token's output begins at 2 * 2**30, and its slots there or later."""
    y = sparse(tmp_path / "slots", 3, top_k, 2**30, dtype=torch.float16)
    y[:, :, :1024] = torch.randn(3, top_k, 1024)
    huge = sparse(tmp_path / "output", 3, 2**30, dtype=torch.float16)
    monkeypatch.setattr(torch, "empty", lambda *sizes, **kwargs: huge)
    monkeypatch.setattr(op, "_combine_kernel", FirstColumns(op._combine_kernel))
    out = op.combine(y, torch.arange(3 * top_k).view(3, top_k), torch.tensor([3 * top_k]))
    assert_close(out[:, :1024], y[:, :, :1024].double().sum(1), TOLERANCE[torch.float16])


@pytest.mark.parametrize("slots", [16, 256])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("tokens", "top_k"), [(7, 3), (1, 1), (0, 2), (64, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_of_rows_come_to_their_slots(tokens, top_k, biased, slots, dtype, monkeypatch):
    monkeypatch.setattr(op, "_SLOTS", slots)
    n = tokens * top_k
    sums, more, row, end = torch.randn(5, n).T, torch.randn(n), torch.randperm(n).view(tokens, top_k), n - n // 3
    sums[end:], more[end:] = float("nan"), float("nan")  # of no expert: nothing was written
    out = op.combine_sums(sums, row, torch.tensor([0, end]), dtype, more if biased else None)
    expected = (sums.double().sum(dim=1) + (more.double() if biased else 0)).nan_to_num(0)[row]
    assert out.dtype == dtype
    assert_close(out, expected, TOLERANCE[dtype])


def test_sums_are_added_in_order_and_the_biases_part_at_last():
    row, offsets = torch.zeros(1, 1, dtype=torch.int64), torch.tensor([1])
    for sums, more, expected in (([1e8, -1e8, 1.0], 0.0, 1.0), ([1.0, -1e8, 1e8], 0.0, 0.0), ([-1e8, 1.0], 1e8, 0.0)):
        sums_NX = torch.tensor([sums]).T.contiguous().T
        out = op.combine_sums(sums_NX, row, offsets, torch.float32, torch.tensor([more]))
        assert out.item() == expected

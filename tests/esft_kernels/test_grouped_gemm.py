import pytest
import torch

from esft_kernels import reference

pytest.importorskip("triton")
from esft_kernels.grouped_gemm import grouped_gemm
from tests.esft_kernels.layers import TOLERANCE, assert_close, poison_empty

COUNTS = [17, 0, 16, 5, 1, 33]  # two tiles, none, exactly one, part of one, one row, three tiles


def expected(rows, trained, frozen, offsets):
    weights = torch.cat([trained, frozen]).double()
    return reference.grouped_gemm(rows.double(), lambda e: weights[e], offsets.tolist(), weights.shape[1])


@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "input gradient"])
@pytest.mark.parametrize("gather", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_matches_reference(dtype, gather, transposed, monkeypatch):
    offsets = torch.tensor([0, *COUNTS]).cumsum(0)
    n, out_features, in_features, s = sum(COUNTS), 37, 71, 2
    shape = (len(COUNTS), in_features, out_features) if transposed else (len(COUNTS), out_features, in_features)
    weights = torch.randn(shape).to(dtype)
    trained, frozen = weights[:s].clone(), weights[s:].clone()
    if transposed:
        trained, frozen = trained.mT, frozen.mT
    rows = torch.randn(11 if gather else n, in_features).to(dtype)
    index = torch.randint(0, 11, (n,)) if gather else None
    poison_empty(monkeypatch)
    out = grouped_gemm(rows, trained, frozen, offsets, n, index_N=index)
    assert out.dtype == dtype
    assert_close(out, expected(rows if index is None else rows[index], trained, frozen, offsets), TOLERANCE[dtype])


@pytest.mark.parametrize("s", [0, 6])
def test_one_pool_may_be_empty(s):
    offsets = torch.tensor([0, *COUNTS]).cumsum(0)
    rows, weights = torch.randn(sum(COUNTS), 20), torch.randn(6, 33, 20)
    out = grouped_gemm(rows, weights[:s], weights[s:], offsets, sum(COUNTS))
    assert_close(out, expected(rows, weights[:s], weights[s:], offsets), TOLERANCE[torch.float32])


def test_rows_past_the_last_position_are_neither_read_nor_written(monkeypatch):
    offsets = torch.tensor([0, 17, 17, 40])
    rows, trained, frozen = torch.randn(40, 20), torch.randn(2, 33, 20), torch.full((1, 33, 20), float("nan"))
    rows[17:] = float("nan")
    poison_empty(monkeypatch)
    out = grouped_gemm(rows, trained, frozen, offsets[:3], num_rows=40)
    assert_close(out[:17], expected(rows, trained, frozen, offsets[:3])[:17], TOLERANCE[torch.float32])
    assert out[17:].isnan().all()


@pytest.mark.parametrize("positions", [0, 3])
def test_no_rows(positions):
    offsets = torch.zeros(positions + 1, dtype=torch.int64)
    out = grouped_gemm(torch.randn(0, 20), torch.randn(positions, 33, 20), torch.randn(0, 33, 20), offsets, 0)
    assert out.shape == (0, 33)

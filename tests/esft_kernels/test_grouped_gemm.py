import pytest
import torch

from esft_kernels import reference

pytest.importorskip("triton")
from esft_kernels.grouped_gemm import grouped_gemm

from tests.esft_kernels.layers import TOLERANCE, assert_close, poison_empty

COUNTS = [17, 0, 16, 5, 1, 33]  # two tiles, none, exactly one, part of one, one row, three tiles
N = sum(COUNTS)


def expected(rows, slot, trained, frozen, offsets, weights=None, biases=(None, None)):
    both = torch.cat([trained, frozen]).double()
    bias = None if biases[0] is None else torch.cat(biases).double()
    by_row = reference.grouped_gemm(
        rows.double(), lambda e: both[e], offsets.tolist(), both.shape[1], None if bias is None else lambda e: bias[e]
    )
    out = torch.full_like(by_row, float("nan"))
    out[slot] = by_row
    return out if weights is None else out * weights.double().reshape(-1, 1)


@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "input gradient"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_matches_reference(dtype, weighted, transposed, monkeypatch):
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
    poison_empty(monkeypatch)
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


def test_rows_past_the_last_position_are_neither_read_nor_written(monkeypatch):
    offsets, slot = torch.tensor([0, 17, 17, 40]), torch.randperm(40)
    rows, trained, frozen = torch.randn(40, 20), torch.randn(2, 33, 20), torch.full((1, 33, 20), float("nan"))
    rows[17:] = float("nan")
    poison_empty(monkeypatch)
    out = grouped_gemm(rows, slot, trained, frozen, offsets[:3])
    exact = expected(rows, slot, trained, frozen, offsets[:3])
    assert_close(out[slot[:17]], exact[slot[:17]], TOLERANCE[torch.float32])
    assert out[slot[17:]].isnan().all()


@pytest.mark.parametrize("positions", [0, 3])
def test_no_rows(positions):
    offsets, none = torch.zeros(positions + 1, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
    out = grouped_gemm(torch.randn(0, 20), none, torch.randn(positions, 33, 20), torch.randn(0, 33, 20), offsets)
    assert out.shape == (0, 33)

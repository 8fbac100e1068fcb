import pytest
import torch

from esft_kernels import reference

pytest.importorskip("triton")
from esft_kernels.grouped_wgrad import grouped_wgrad

from esft_kernels import grouped_wgrad as op
from tests.esft_kernels.layers import TOLERANCE, assert_close, poison_empty

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize(("splits", "wide"), [(1, False), (3, True)])
@pytest.mark.parametrize("gather", ["neither", "grad", "rows"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_reference(dtype, gather, splits, wide, monkeypatch):
    monkeypatch.setattr(op, "wide", lambda *tensors: wide)
    monkeypatch.setattr(op, "splits_for", lambda tensor, programs: splits)
    offsets = torch.tensor([0, 16, 16, 17, 52])  # exactly one step of the row loop, none, part of one, three
    n, tokens, out_features, in_features = 52, 11, 37, 71
    grad = torch.randn(tokens + 1 if gather == "grad" else n + 9, out_features).to(dtype)
    rows = torch.randn(tokens + 1 if gather == "rows" else n + 9, in_features).to(dtype)
    for operand, gathered in ((grad, gather == "grad"), (rows, gather == "rows")):
        operand[tokens if gathered else n :] = float("nan")  # what rows past the prefix hold is never read
    index = torch.randint(0, tokens, (n + 9,))
    index[n:] = tokens
    poison_empty(monkeypatch)
    out = grouped_wgrad(
        grad, rows, torch.zeros(4, out_features, in_features, dtype=dtype), offsets,
        grad_index_N=index if gather == "grad" else None, rows_index_N=index if gather == "rows" else None,
    )  # fmt: skip
    assert out.dtype == dtype and not out[1].any()
    grad_rows = grad[index] if gather == "grad" else grad
    in_rows = rows[index] if gather == "rows" else rows
    expected = reference.grouped_wgrad(grad_rows[:n].double(), in_rows[:n].double(), offsets.tolist(), 4)
    assert_close(out, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("splits", [1, 2])
def test_the_gradient_is_laid_out_like_the_weights(splits, monkeypatch):
    monkeypatch.setattr(op, "splits_for", lambda tensor, programs: splits)
    offsets = torch.tensor([0, 9, 40])
    grad, rows = torch.randn(40, 24), torch.randn(40, 33)
    like = torch.zeros(2, 33, 24).mT
    out = grouped_wgrad(grad, rows, like, offsets)
    assert out.stride() == like.stride()
    assert_close(out, reference.grouped_wgrad(grad.double(), rows.double(), offsets.tolist(), 2), 1e-5)


@pytest.mark.parametrize("features", [16, 37])
def test_paired_columns_go_to_weights_with_all_gates_first(features):
    offsets = torch.tensor([0, 9, 40])
    grad, rows = torch.randn(40, 2 * features), torch.randn(40, 33)  # all gates first
    paired = grad.view(40, 2, features).transpose(1, 2).reshape(40, 2 * features)
    out = grouped_wgrad(paired, rows, torch.zeros(2, 2 * features, 33), offsets, paired=True)
    assert_close(out, reference.grouped_wgrad(grad.double(), rows.double(), offsets.tolist(), 2), 1e-5)


def test_no_trained_expert():
    none = torch.zeros(0, 8, 4)
    assert grouped_wgrad(torch.randn(5, 8), torch.randn(5, 4), none, torch.zeros(1, dtype=torch.int64)).numel() == 0


def test_no_row():
    like = torch.ones(2, 8, 4)
    out = grouped_wgrad(torch.randn(0, 8), torch.randn(0, 4), like, torch.zeros(3, dtype=torch.int64))
    assert torch.equal(out, torch.zeros(2, 8, 4))

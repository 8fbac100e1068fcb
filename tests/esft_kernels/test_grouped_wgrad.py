import pytest
import torch

from esft_kernels import reference

pytest.importorskip("triton")
from esft_kernels.grouped_wgrad import grouped_wgrad
from tests.esft_kernels.layers import TOLERANCE, assert_close, poison_empty


@pytest.mark.parametrize("gather", ["neither", "grad", "rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_matches_reference(dtype, gather, monkeypatch):
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
        grad, rows, offsets,
        grad_index_N=index if gather == "grad" else None, rows_index_N=index if gather == "rows" else None,
    )  # fmt: skip
    assert out.dtype == dtype and not out[1].any()
    grad_rows = grad[index] if gather == "grad" else grad
    in_rows = rows[index] if gather == "rows" else rows
    expected = reference.grouped_wgrad(grad_rows[:n].double(), in_rows[:n].double(), offsets.tolist(), 4)
    assert_close(out, expected, TOLERANCE[dtype])


def test_no_trained_expert():
    assert grouped_wgrad(torch.randn(5, 8), torch.randn(5, 4), torch.zeros(1, dtype=torch.int64)).shape == (0, 8, 4)


def test_no_row():
    out = grouped_wgrad(torch.randn(0, 8), torch.randn(0, 4), torch.zeros(3, dtype=torch.int64))
    assert torch.equal(out, torch.zeros(2, 8, 4))

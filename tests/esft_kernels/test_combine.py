import pytest
import torch

from esft_kernels import reference

pytest.importorskip("triton")
from esft_kernels import combine as op
from tests.esft_kernels.layers import TOLERANCE, assert_close, poison_empty


@pytest.mark.parametrize("max_block", [16, 1024])
@pytest.mark.parametrize("top_k", [1, 3, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_matches_reference(dtype, top_k, max_block, monkeypatch):
    monkeypatch.setattr(op, "_MAX_BLOCK", max_block)
    y = torch.randn(7, top_k, 37).to(dtype)
    row, end = torch.randperm(7 * top_k).view(7, top_k), 7 * top_k - 3
    nobody = row >= end
    poison_empty(monkeypatch)
    out = op.combine(y.masked_fill(nobody[:, :, None], float("nan")), row, torch.tensor([0, 2, end]))
    assert out.dtype == dtype
    assert_close(out, reference.combine(y.masked_fill(nobody[:, :, None], 0).double()), TOLERANCE[dtype])


def test_no_token():
    assert op.combine(torch.randn(0, 2, 8), torch.empty(0, 2, dtype=torch.int64), torch.tensor([0])).shape == (0, 8)

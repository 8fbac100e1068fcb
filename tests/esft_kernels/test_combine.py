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
    poison_empty(monkeypatch)
    out = op.combine(y)
    assert out.dtype == dtype
    assert_close(out, reference.combine(y.double()), TOLERANCE[dtype])


def test_no_token():
    assert op.combine(torch.randn(0, 2, 8)).shape == (0, 8)

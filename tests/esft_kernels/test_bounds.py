"""That the check of addresses sees what it is there for."""

import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl

from tests.esft_kernels.bounds import check_bounds


@triton.jit
def _copy(in_ptr, out_ptr, size, limit, stride, BLOCK: tl.constexpr):
    n = tl.arange(0, BLOCK)
    tl.store(out_ptr + n * stride, tl.load(in_ptr + n, mask=n < limit, other=0.0), mask=n < size)


@pytest.mark.parametrize(
    ("size", "limit", "stride", "message"),
    [(5, 6, 1, "1 addresses outside"), (6, 5, 1, "1 addresses outside"), (5, 5, 0, "stored twice")],
    ids=["load past the end", "store past the end", "two stores to one element"],
)
def test_seen(size, limit, stride, message, monkeypatch):
    check_bounds(monkeypatch)
    buffer, out = torch.zeros(20), torch.zeros(20)
    with pytest.raises(Exception, match=message):
        _copy[(1,)](buffer[:5], out[:5], size, limit, stride, BLOCK=8)


def test_a_kernel_within_its_tensors_passes(monkeypatch):
    check_bounds(monkeypatch)
    out = torch.zeros(5)
    _copy[(1,)](torch.ones(5), out, 5, 5, 1, BLOCK=8)
    assert out.tolist() == [1.0] * 5

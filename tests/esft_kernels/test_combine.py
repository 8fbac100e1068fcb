import pytest
import torch

from esft_kernels import reference

pytest.importorskip("triton")
from esft_kernels import combine as op
from tests.esft_kernels.layers import TOLERANCE, assert_close, make_layer, poison_empty


@pytest.mark.parametrize("max_block", [16, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_matches_reference(dtype, max_block, monkeypatch):
    monkeypatch.setattr(op, "_MAX_BLOCK", max_block)
    layer = make_layer(tokens=7)
    routing, weights = layer.routing, layer.weights_TK.float()
    y = torch.randn(routing.num_rows, 37).to(dtype)
    poison_empty(monkeypatch)
    weighted, plain = op.combine(y, routing.row_TK, weights), op.combine(y, routing.row_TK)
    assert weighted.dtype == plain.dtype == dtype
    assert_close(weighted, reference.combine(y.double(), weights.double(), routing), TOLERANCE[dtype])
    assert_close(plain, y.double()[routing.row_TK].sum(1), TOLERANCE[dtype])


def test_no_token():
    assert op.combine(torch.randn(0, 8), torch.empty(0, 2, dtype=torch.int64)).shape == (0, 8)

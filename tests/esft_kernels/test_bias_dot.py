import pytest
import torch

pytest.importorskip("triton")
from esft_kernels.bias_dot import bias_dot

from tests.esft_kernels.layers import TOLERANCE, assert_close, make_layer, poison_empty

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_bias_dot(dtype, monkeypatch):
    layer = make_layer(tokens=45, hidden=131, used=(1, 2, 3, 5), biased=True, dtype=dtype)
    pools, routing = layer.pools, layer.routing
    poison_empty(monkeypatch)
    out = bias_dot(layer.grad_out_TD, pools, routing)
    exact = layer.to(torch.float64)
    offsets = routing.offsets_E1.tolist()
    for e in range(routing.num_experts):
        start, end = offsets[e : e + 2]
        rows = exact.grad_out_TD[routing.token_N[start:end]]
        assert_close(out[start:end], rows @ exact.pools.at(e).down_bias_ED, TOLERANCE[torch.float32])

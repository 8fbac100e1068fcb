import pytest
import torch

pytest.importorskip("triton")
from esft_kernels.triton_ops.bias_dot import bias_dot
from tests.esft_kernels.bounds import check_bounds, poison_masked
from tests.esft_kernels.layers import TOLERANCE, Layer, assert_close, make_layer, poison_empty


def check(layer: Layer, monkeypatch) -> None:
    pools, routing = layer.pools, layer.routing
    poison_empty(monkeypatch)
    poison_masked(monkeypatch)
    check_bounds(monkeypatch)
    out = bias_dot(layer.grad_out_TD, pools, routing)
    assert out.shape == (routing.num_rows,) and out.dtype == torch.float32
    exact = layer.to(torch.float64)
    offsets = routing.offsets_E1.tolist()
    for e in range(routing.num_experts):
        start, end = offsets[e : e + 2]
        rows = exact.grad_out_TD[routing.token_N[start:end]]
        assert_close(out[start:end], rows @ exact.pools.at(e).down_bias_ED, TOLERANCE[torch.float32])
    assert out[offsets[-1] :].isnan().all()  # rows of no expert


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bias_dot(dtype, monkeypatch):
    check(make_layer(tokens=45, hidden=131, used=(1, 2, 3, 5), biased=True, dtype=dtype), monkeypatch)


@pytest.mark.parametrize("hidden", [20, 128, 129])  # one block of columns has 128
@pytest.mark.parametrize("trained", [(), (0,), (0, 1)])
def test_sizes_and_pools(hidden, trained, monkeypatch):
    layer = make_layer(
        tokens=9, top_k=1, experts=2, hidden=hidden, trained=trained, biased=True, dtype=torch.float32
    )  # fmt: skip
    check(layer, monkeypatch)


@pytest.mark.parametrize("tokens", [0, 31, 32, 33, 64])  # one tile has 32 rows
def test_all_rows_on_one_expert(tokens, monkeypatch):
    layer = make_layer(tokens=tokens, top_k=1, hidden=20, used=(4,), biased=True, dtype=torch.float32)
    check(layer, monkeypatch)


def test_rows_of_no_expert_are_left_alone(monkeypatch):
    layer = make_layer(tokens=9, hidden=20, biased=True, elsewhere=True, dtype=torch.float32)
    assert int(layer.routing.offsets_E1[-1]) < layer.routing.num_rows
    check(layer, monkeypatch)

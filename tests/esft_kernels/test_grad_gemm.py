import pytest
import torch

from esft_kernels import reference
from esft_kernels.pools import Needs

pytest.importorskip("triton")
import triton.language as tl
from esft_kernels.grad_gemm import grad_gemm

from esft_kernels import grad_gemm as op
from tests.esft_kernels.layers import ACTIVATIONS, TOLERANCE, Layer, assert_close, h_columns, make_layer, poison_empty

NEEDS = [Needs(*map(bool, bits)) for bits in ((1, 1, 1), (1, 0, 0), (0, 1, 1), (0, 1, 0), (0, 0, 1))]


def exact_parts(layer: Layer) -> tuple[torch.Tensor, ...]:
    """H and its gradient with columns as the kernels order them, weighted A, and row sums, in float64."""
    layer = layer.to(torch.float64)
    pools, routing = layer.pools, layer.routing
    _, h = reference.forward(layer.x_TD, layer.weights_TK, pools, routing, routing.num_rows)
    gate, up = pools.split(h)
    a = pools.activation.forward(gate, up)
    weight = reference.row_weights(layer.weights_TK, routing, torch.float64)
    grad_a = reference.grouped_gemm(
        layer.grad_out_TD[routing.token_N], lambda e: pools.at(e).down_EDF.T, routing.offsets_E1.tolist(), a.shape[1]
    )
    grad_h = torch.empty_like(h)
    for part, grad in zip(pools.split(grad_h), pools.activation.backward(grad_a * weight, gate, up), strict=True):
        if part is not None:
            part.copy_(grad)
    columns = h_columns(pools)
    return h[:, columns], grad_h[:, columns], a * weight, (grad_a * a).sum(-1)


def check(layer: Layer, needs: Needs, monkeypatch) -> None:
    routing, dtype = layer.routing, layer.x_TD.dtype
    prefix, tolerance = routing.prefix_rows(), TOLERANCE[dtype]
    h, exact_grad_h, exact_weighted, exact_sums = exact_parts(layer)
    if not needs.all_rows:
        h = h[:prefix]
    poison_empty(monkeypatch)
    pools, h = layer.pools, h.to(dtype).contiguous()
    grad_h, weighted_a, sums = grad_gemm(layer.grad_out_TD, h, layer.weights_TK, pools, routing, needs)
    if needs.x:
        assert_close(grad_h, exact_grad_h, tolerance)
    elif needs.trained:
        assert grad_h is not None and grad_h[prefix:].isnan().all()
        assert_close(grad_h[:prefix], exact_grad_h[:prefix], tolerance)
    else:
        assert grad_h is None
    if needs.trained:
        assert weighted_a is not None and weighted_a[prefix:].isnan().all()
        assert_close(weighted_a[:prefix], exact_weighted[:prefix], tolerance)
    else:
        assert weighted_a is None
    assert (sums is not None) == needs.weights
    if sums is not None:
        assert sums.shape[1] > 1, "one tile of F shows nothing of the sum over tiles"
        assert_close(sums.sum(dim=1), exact_sums, tolerance)


@pytest.mark.parametrize("needs", NEEDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_only_what_is_needed(dtype, needs, monkeypatch):
    check(make_layer(intermediate=41, dtype=dtype), needs, monkeypatch)


@pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_activations(activation, monkeypatch):
    check(make_layer(dtype=torch.float32, activation=activation), NEEDS[0], monkeypatch)


@pytest.mark.parametrize("activation", [ACTIVATIONS["silu"], ACTIVATIONS["relu2"]], ids=["gated", "plain"])
def test_columns_finished_in_pieces_and_64_bit_offsets(activation, monkeypatch):
    monkeypatch.setattr(op, "PIECE", tl.constexpr(8))
    monkeypatch.setattr(op, "wide", lambda *tensors: True)
    check(make_layer(dtype=torch.float32, activation=activation), NEEDS[0], monkeypatch)


@pytest.mark.parametrize("layout", [{"interleaved": True}, {"transposed": True}, {"trained": ()}], ids=str)
def test_layouts(layout, monkeypatch):
    check(make_layer(dtype=torch.float32, **layout), NEEDS[1], monkeypatch)

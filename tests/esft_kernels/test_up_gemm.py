import pytest
import torch

from esft_kernels import reference

pytest.importorskip("triton")
import triton.language as tl
from esft_kernels.up_gemm import up_gemm

from esft_kernels import up_gemm as op
from tests.esft_kernels.layers import (
    ACTIVATIONS,
    TOLERANCE,
    Layer,
    assert_close,
    h_columns,
    make_layer,
    poison_empty,
)


def expected(layer: Layer) -> tuple[torch.Tensor, torch.Tensor]:
    """H, its columns ordered as the kernels order them, and A, in float64."""
    layer = layer.to(torch.float64)
    pools, routing = layer.pools, layer.routing
    _, h = reference.forward(layer.x_TD, layer.weights_TK, pools, routing, routing.num_rows)
    return h[:, h_columns(pools)], pools.activation.forward(*pools.split(h))


def buffers(layer: Layer, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    pools, n = layer.pools, layer.routing.num_rows
    return layer.x_TD.new_empty(rows, pools.gate_up_size), layer.x_TD.new_empty(n, pools.intermediate_size)


@pytest.mark.parametrize("layout", [{}, {"interleaved": True}, {"transposed": True}, {"biased": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_layouts_and_dtypes(dtype, layout, monkeypatch):
    layer = make_layer(dtype=dtype, hidden=71, intermediate=37, tokens=45, **layout)
    poison_empty(monkeypatch)
    h, a = buffers(layer, layer.routing.num_rows)
    routing = layer.routing
    up_gemm(layer.x_TD, routing.token_N, layer.pools, routing.offsets_E1, routing.num_trained, h, a)
    for actual, exact in zip((h, a), expected(layer), strict=True):
        assert_close(actual, exact, TOLERANCE[dtype])


@pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_activations(activation):
    layer = make_layer(dtype=torch.float32, activation=activation)
    h, a = buffers(layer, layer.routing.num_rows)
    routing = layer.routing
    up_gemm(layer.x_TD, routing.token_N, layer.pools, routing.offsets_E1, routing.num_trained, h, a)
    for actual, exact in zip((h, a), expected(layer), strict=True):
        assert_close(actual, exact, TOLERANCE[torch.float32])


@pytest.mark.parametrize("activation", [ACTIVATIONS["silu"], ACTIVATIONS["relu2"]], ids=["gated", "plain"])
def test_columns_finished_in_pieces_and_64_bit_offsets(activation, monkeypatch):
    monkeypatch.setattr(op, "PIECE", tl.constexpr(8))
    monkeypatch.setattr(op, "wide", lambda *tensors: True)
    layer = make_layer(dtype=torch.float32, activation=activation, biased=True)
    h, a = buffers(layer, layer.routing.num_rows)
    routing = layer.routing
    op.up_gemm(layer.x_TD, routing.token_N, layer.pools, routing.offsets_E1, routing.num_trained, h, a)
    for actual, exact in zip((h, a), expected(layer), strict=True):
        assert_close(actual, exact, TOLERANCE[torch.float32])


@pytest.mark.filterwarnings("ignore:overflow")  # numpy's, inside the interpreter: exp overflows to inf, as it should
def test_extreme_gates_do_not_overflow():
    layer = make_layer(dtype=torch.float32, tokens=4)
    layer.x_TD.mul_(1e4)
    h, a = buffers(layer, layer.routing.num_rows)
    routing = layer.routing
    up_gemm(layer.x_TD, routing.token_N, layer.pools, routing.offsets_E1, routing.num_trained, h, a)
    assert a.isfinite().all()
    assert_close(a, expected(layer)[1], TOLERANCE[torch.float32])


def test_h_is_written_for_the_rows_kept_only(monkeypatch):
    layer = make_layer(dtype=torch.float32)
    routing = layer.routing
    rows = routing.prefix_rows()
    poison_empty(monkeypatch)
    h, a = buffers(layer, rows + 1)
    up_gemm(layer.x_TD, routing.token_N, layer.pools, routing.offsets_E1, routing.num_trained, h[:rows], a)
    exact_h, exact_a = expected(layer)
    assert_close(h[:rows], exact_h[:rows], TOLERANCE[torch.float32])
    assert_close(a, exact_a, TOLERANCE[torch.float32])
    assert h[rows:].isnan().all()


@pytest.mark.parametrize("tokens", [20, 45, 0])
def test_frozen_rows_alone(tokens, monkeypatch):
    layer = make_layer(dtype=torch.float32, tokens=tokens)
    routing = layer.routing
    poison_empty(monkeypatch)
    h, _ = buffers(layer, routing.num_rows)
    up_gemm(layer.x_TD, routing.token_N, layer.pools, routing.offsets_E1[routing.num_trained :], 0, h, None)
    prefix = routing.prefix_rows()
    assert h[:prefix].isnan().all()
    assert_close(h[prefix:], expected(layer)[0][prefix:], TOLERANCE[torch.float32])


def test_a_nan_weight_stays_a_nan_through_a_clamp():
    layer = make_layer(dtype=torch.float32, activation=ACTIVATIONS["gpt-oss"])
    layer.gate_up_EGD[:] = float("nan")
    h, a = buffers(layer, layer.routing.num_rows)
    routing = layer.routing
    up_gemm(layer.x_TD, routing.token_N, layer.pools, routing.offsets_E1, routing.num_trained, h, a)
    assert a.isnan().all()

import pytest
import torch

from esft_kernels import reference

pytest.importorskip("triton")
from esft_kernels import swiglu as op
from esft_kernels.pools import Needs
from tests.esft_kernels.layers import TOLERANCE, assert_close, make_layer, poison_empty

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("features", [1, 40, 64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward(dtype, features, monkeypatch):
    h = torch.randn(9, 2 * features).to(dtype)
    poison_empty(monkeypatch)
    assert_close(op.swiglu(h), reference.swiglu(h.double()), TOLERANCE[dtype])


def test_rows_longer_than_a_block(monkeypatch):
    monkeypatch.setattr(op, "_MAX_BLOCK", 16)
    layer = make_layer(intermediate=40, dtype=torch.float32)
    routing = layer.routing
    h, grad_a = torch.randn(routing.num_rows, 80), torch.randn(routing.num_rows, 40)
    assert_close(op.swiglu(h), reference.swiglu(h.double()), 1e-5)
    _, _, grad_weights = op.swiglu_backward(grad_a, h, layer.weights_TK, routing, Needs(True, True, True))
    expected = (grad_a.double() * reference.swiglu(h.double())).sum(-1)[routing.row_TK]
    assert_close(grad_weights, expected, 1e-5)


@pytest.mark.filterwarnings("ignore:overflow")  # numpy's, inside the interpreter: exp overflows to inf, as it should
def test_extreme_gates_do_not_overflow():
    h = torch.tensor([[-1e4, 1e4, 0.0, 1.0, 1.0, 1.0]])
    assert torch.equal(op.swiglu(h), torch.tensor([[0.0, 1e4, 0.0]]))


@pytest.mark.parametrize(
    "needs", [Needs(*map(bool, bits)) for bits in ((1, 1, 1), (1, 0, 0), (0, 1, 1), (0, 1, 0), (0, 0, 1))], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_backward(dtype, needs, monkeypatch):
    layer = make_layer(intermediate=41, dtype=dtype)
    routing = layer.routing
    n, prefix = routing.num_rows, routing.prefix_rows()
    rows = n if needs.all_rows else prefix
    h, grad_a = torch.randn(n, 82).to(dtype)[:rows], torch.randn(n, 41).to(dtype)[:rows]
    poison_empty(monkeypatch)
    grad_h, weighted_a, grad_weights = op.swiglu_backward(grad_a, h, layer.weights_TK, routing, needs)

    weight_N1 = layer.weights_TK.double().reshape(-1)[routing.slot_N[:rows], None]
    a = reference.swiglu(h.double())
    expected_h = reference.swiglu_backward(grad_a.double() * weight_N1, h.double())
    if needs.x:
        assert_close(grad_h, expected_h, TOLERANCE[dtype])
    elif needs.trained:
        assert grad_h is not None and grad_h[prefix:].isnan().all()
        assert_close(grad_h[:prefix], expected_h[:prefix], TOLERANCE[dtype])
    else:
        assert grad_h is None
    if needs.trained:
        assert weighted_a is not None and weighted_a[prefix:].isnan().all()
        assert_close(weighted_a[:prefix], (a * weight_N1)[:prefix], TOLERANCE[dtype])
    else:
        assert weighted_a is None
    assert_close(
        grad_weights, (grad_a.double() * a).sum(-1)[routing.row_TK] if needs.weights else None, TOLERANCE[dtype]
    )

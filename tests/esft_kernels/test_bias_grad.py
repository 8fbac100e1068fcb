import pytest
import torch

from esft_kernels import reference

pytest.importorskip("triton")
from esft_kernels.bias_grad import bias_grad

from tests.esft_kernels.layers import TOLERANCE, assert_close, make_layer, poison_empty

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("gather", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bias_grad(dtype, gather, monkeypatch):
    layer = make_layer(tokens=45, used=(0, 1, 2, 3, 5), dtype=dtype)  # no row on expert 4, the first trained
    routing = layer.routing
    s, prefix = routing.num_trained, routing.prefix_rows()
    grad = torch.randn(45 if gather else routing.num_rows, 131).to(dtype)
    if not gather:
        grad[prefix:] = float("nan")
    poison_empty(monkeypatch)
    extra = (routing.token_N, layer.weights_TK, routing.slot_N) if gather else ()
    out = bias_grad(grad, routing.offsets_E1[: s + 1], *extra)
    rows = grad.double()
    if gather:
        rows = rows[routing.token_N] * reference.row_weights(layer.weights_TK, routing, torch.float64)
    assert not out[0].any()
    assert_close(out, reference.bias_grad(rows, routing.offsets_E1.tolist(), s), TOLERANCE[dtype])


def test_bias_grad_puts_paired_columns_to_all_gates_first():
    grad = torch.arange(6.0).repeat(3, 1)
    out = bias_grad(grad, torch.tensor([0, 3]), paired=True)
    assert out.tolist() == [[0, 6, 12, 3, 9, 15]]

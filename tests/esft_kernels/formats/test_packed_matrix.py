"""A matrix in few bits multiplies as its decoded values do, and gives single rows."""

import pytest
import torch
import torch.nn.functional as F

from esft_kernels.formats import nf4, packed_matrix
from esft_kernels.formats.packed_matrix import ROW_FORMATS, decode, encode, layout, nbytes, packed_linear
from esft_kernels.formats.resolve import FORMATS

SIZES = [(5, 64), (3, 100), (1, 1), (130, 70)]


def encoded(name: str, weight: torch.Tensor) -> list[torch.Tensor]:
    parts = [torch.empty(stored.shape, dtype=stored.dtype) for stored in layout(name, *weight.shape).values()]
    encode(name, weight, parts)
    return parts


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", ROW_FORMATS)
def test_each_row_is_as_the_format_has_it_alone(name, size, monkeypatch):
    monkeypatch.setattr(packed_matrix, "STRIP", 2)
    torch.manual_seed(0)
    weight = torch.randn(size)
    whole = decode(name, encoded(name, weight), size[1], torch.float32)
    kind = FORMATS[name]
    for row, found in zip(weight, whole, strict=True):
        alone = kind.quantize(row[None, None])
        out = torch.empty(kind.buffer_size(1, size[1]))
        assert torch.equal(kind.decode([part[0] for part in alone], 1, size[1], out)[0], found)


@pytest.mark.parametrize("name", ROW_FORMATS)
def test_rows_can_be_read_without_the_others(name):
    torch.manual_seed(0)
    parts, wanted = encoded(name, torch.randn(9, 70)), torch.tensor([4, 0, 4, 8])
    rows = decode(name, [part[wanted] for part in parts], 70, torch.bfloat16)
    assert torch.equal(rows, decode(name, parts, 70, torch.bfloat16)[wanted])
    assert decode(name, [part[:0] for part in parts], 70, torch.float32).shape == (0, 70)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("name", ROW_FORMATS)
def test_the_product_and_its_gradient_are_those_of_the_decoded_matrix(name, biased, dtype):
    torch.manual_seed(0)
    parts = encoded(name, torch.randn(33, 70))
    bias = torch.randn(33, dtype=dtype) if biased else None
    x = torch.randn(2, 3, 70, dtype=dtype, requires_grad=True)
    twin = x.detach().double().requires_grad_()
    expected = F.linear(twin, decode(name, parts, 70, dtype).double(), None if bias is None else bias.double())
    grad_out = torch.randn(2, 3, 33, dtype=dtype)
    found = packed_linear(x, parts, bias, name)
    found.backward(grad_out)
    expected.backward(grad_out.double())
    assert found.dtype == x.grad.dtype == dtype
    tolerance = {"rtol": 2e-2, "atol": 5e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(found.double(), expected, **tolerance)
    torch.testing.assert_close(x.grad.double(), twin.grad, **tolerance)


def test_gradients_of_gradients_do_not_exist_and_nothing_but_x_trains():
    x = torch.randn(2, 64, requires_grad=True)
    parts, bias = encoded("int8", torch.randn(4, 64)), torch.zeros(4, requires_grad=True)
    packed_linear(x, parts, bias, "int8").sum().backward()
    assert bias.grad is None and x.grad is not None


def test_between_forward_and_backward_no_decoded_matrix_is_kept():
    x = torch.randn(2, 640, requires_grad=True)
    parts, kept = encoded("nf4", torch.randn(100, 640)), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        packed_linear(x, parts, None, "nf4")
    assert sum(t.nbytes for t in kept) == sum(part.nbytes for part in parts)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", ROW_FORMATS)
def test_its_bytes_are_those_of_its_tensors(name, size):
    assert nbytes(name, *size) == sum(part.nbytes for part in encoded(name, torch.zeros(size)))


def test_bad_weights_and_formats_are_refused():
    parts = encoded("int8", torch.zeros(2, 64))
    with pytest.raises(ValueError, match="int8: weights are not finite"):
        encode("int8", torch.full((2, 64), torch.nan), parts)
    with pytest.raises(ValueError, match="a matrix is kept in one of int8, nf4, got 'fp8'"):
        layout("fp8", 2, 64)


@pytest.mark.parametrize("name", ROW_FORMATS)
def test_with_bitsandbytes_and_without_it_the_matrix_is_the_same(name, monkeypatch):
    parts = encoded(name, torch.randn(9, 70))
    found = decode(name, parts, 70, torch.bfloat16).clone()
    monkeypatch.setattr(nf4, "bitsandbytes", lambda: None)
    assert torch.equal(decode(name, parts, 70, torch.bfloat16), found)

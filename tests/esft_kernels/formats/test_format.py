"""What every format promises."""

import pytest
import torch

from esft_kernels.formats.format import PIECE, blocks_of, padded
from esft_kernels.formats.resolve import FORMATS
from tests.esft_kernels.formats.twins import exact

ERROR = {"int8": 0.006, "nf4": 0.092, "nf4_double": 0.092, "fp8": 0.026, "mxfp4": 0.115}  # relative, as documented
BYTES = {"int8": 1.0625, "nf4": 0.5625, "nf4_double": 0.516, "fp8": 1.0, "mxfp4": 0.53125}  # a weight
EVEN, ODD = (256, 128), [(8, 96), (1, 1), (3, 67), (130, 200), (129, 33), (5, 31), (64, 130)]


@pytest.fixture(params=FORMATS)
def kind(request):
    return FORMATS[request.param]


def decoded(kind, tensors, rows, columns, dtype=torch.float32):
    """The whole stack; the buffer holds NaN first, and is copied from."""
    buffer = torch.full((kind.buffer_size(rows, columns),), float("nan"), dtype=dtype)
    return torch.stack([kind.decode(parts, rows, columns, buffer).clone() for parts in zip(*tensors, strict=True)])


def test_the_error_on_normal_weights_is_the_documented_one(kind):
    torch.manual_seed(0)
    weights = torch.randn(2, 512, 1024)
    off = decoded(kind, kind.quantize(weights), 512, 1024) - weights
    assert (off.square().mean() / weights.square().mean()).sqrt() == pytest.approx(ERROR[kind.name], rel=0.03)


def test_bytes_are_those_of_the_tensors(kind):
    tensors = kind.quantize(torch.randn(2, *EVEN))
    assert kind.nbytes(2, *EVEN) == sum(t.numel() * t.element_size() for t in tensors)
    assert kind.nbytes(8, 2816, 2048) / (8 * 2816 * 2048) == pytest.approx(BYTES[kind.name], rel=1e-3)


@pytest.mark.parametrize("size", [EVEN, *ODD], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_code_times_scale_rounded_once(kind, size, dtype):
    torch.manual_seed(1)
    tensors = kind.quantize(torch.randn(3, *size))
    kind.check(tensors, 3, *size, "weights")
    found = decoded(kind, tensors, *size, dtype)
    assert found.shape == (3, *size) and found.dtype == dtype
    for matrix, parts in zip(found, zip(*tensors, strict=True), strict=True):
        twin = exact(kind.name, parts, *size)
        allowed = 2.0**-24 + (0 if dtype == torch.float64 else torch.finfo(dtype).eps / 2)
        doubled = 2.0**-22 * twin.abs().max() if kind.name == "nf4_double" else 0  # its scales are sums
        assert ((matrix.double() - twin).abs() <= allowed * twin.abs() + doubled + torch.finfo(dtype).tiny).all()


def test_matrices_of_more_than_one_piece_are_decoded_whole(kind):
    rows, columns = 2, PIECE  # the second row, and a remainder
    tensors = kind.quantize(torch.randn(1, rows, columns + 64))
    found = decoded(kind, tensors, rows, columns + 64)[0]
    parts = [tensor[0] for tensor in tensors]
    assert (found - exact(kind.name, parts, rows, columns + 64)).abs().max() < 1e-5


def test_zeros_stay_zeros_and_tiny_weights_finite(kind):
    weights = torch.zeros(1, 4, 256)
    weights[0, 1] = 1e-42
    found = decoded(kind, kind.quantize(weights), 4, 256)
    assert found.isfinite().all() and not found[0, 0].any() and not found[0, 2:].any()


def test_strided_and_16_bit_stacks_are_quantized_as_their_values(kind):
    weights = torch.randn(2, 96, 64).bfloat16()
    expected = kind.quantize(weights.float().mT.contiguous())
    for tensor, other in zip(kind.quantize(weights.mT), expected, strict=True):
        assert torch.equal(tensor.view(torch.uint8), other.view(torch.uint8))


def test_a_stack_without_experts_has_tensors_without_elements(kind):
    tensors = kind.quantize(torch.empty(0, 8, 64))
    assert [len(t) for t in tensors] == [0] * len(kind.layout(0, 8, 64))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(kind, value):
    weights = torch.randn(3, 8, 64)
    weights[1, 2, 3] = value
    with pytest.raises(ValueError, match=f"^{kind.name}: weights of expert 1 are not finite$"):
        kind.quantize(weights)


def test_tensors_that_do_not_fit_are_named(kind):
    tensors = kind.quantize(torch.randn(2, *EVEN))
    with pytest.raises(ValueError, match=f"^down in {kind.name} is .*; got {len(tensors) - 1} tensors$"):
        kind.check(tensors[1:], 2, *EVEN, "down")
    for place, (part, (shape, _)) in enumerate(kind.layout(2, *EVEN).items()):
        for spoilt in (tensors[place][:1], tensors[place].to(torch.float64)):
            changed = [*tensors[:place], spoilt, *tensors[place + 1 :]]
            with pytest.raises(ValueError, match=f"^down {part} of {kind.name} must be torch.*, got torch"):
                kind.check(changed, 2, *EVEN, "down")
        if len(shape) > 1 and shape[1] > 1:
            strided = torch.empty_like(tensors[place].T.contiguous()).T if len(shape) == 2 else tensors[place].clone()
            strided = strided if len(shape) == 2 else strided.transpose(0, 1).contiguous().transpose(0, 1)
            changed = [*tensors[:place], strided, *tensors[place + 1 :]]
            with pytest.raises(ValueError, match=f"^down {part} of {kind.name} must be contiguous"):
                kind.check(changed, 2, *EVEN, "down")


def test_a_scale_that_is_no_number_is_found(kind):
    tensors = kind.quantize(torch.randn(2, *EVEN))
    kind.check_values(tensors, "down")
    last = tensors[-1]
    last.view(-1)[-1] = float("nan") if last.is_floating_point() else 255
    with pytest.raises(ValueError, match=f"^down: a scale of {kind.name} is not finite$"):
        kind.check_values(tensors, "down")


def test_blocks_hold_everything_and_the_last_is_padded_with_zeros():
    assert [blocks_of(n, 64) for n in (0, 1, 64, 65)] == [0, 1, 1, 2]
    rows = torch.arange(1, 7).view(2, 3)
    assert padded(rows, 2).tolist() == [[[1, 2], [3, 0]], [[4, 5], [6, 0]]]

import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl

from esft_kernels.formats import fp8, mxfp4
from esft_kernels.formats.resolve import FORMATS
from esft_kernels.pools import ExpertWeights, dequantize, quantize
from esft_kernels.triton_ops.decode import coded, decode, e2m1, e4m3, e8m0, load_weight, stack, weight_operands
from tests.esft_kernels.bounds import check_bounds, poison_masked

# G, D, F: less than a block; whole blocks, in a part of a tile; rows that end in one; tiles, whose last is not whole.
SIZES = [(24, 67, 12), (20, 64, 128), (260, 130, 130), (74, 256, 32)]


def pool(size: tuple[int, int, int], name: str, experts: int = 3):
    g, d, f = size
    return quantize(ExpertWeights(torch.randn(experts, g, d), torch.randn(experts, d, f)), name)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("first", [0, 1, 3])
def test_the_scratch_holds_the_formats_own_weights(name, size, first, monkeypatch):
    quantized = pool(size, name)
    plain = dequantize(quantized, torch.float32)
    check_bounds(monkeypatch)
    poison_masked(monkeypatch)
    for projection, whole in (("gate_up", plain.gate_up_EGD), ("down", plain.down_EDF)):
        for dtype in (torch.float32, torch.float16):  # bf16 is cut off, not rounded, by the interpreter
            out = torch.full_like(whole[first:], float("nan"), dtype=dtype)
            decode(quantized, projection, first, out)
            assert torch.equal(out, whole[first:].to(dtype))


@triton.jit
def _values(codes_ptr, out_ptr, KIND: tl.constexpr):
    n = tl.arange(0, 256)
    code = tl.load(codes_ptr + n)
    if KIND == "e4m3":
        value = e4m3(code)
    elif KIND == "e8m0":
        value = e8m0(code)
    else:
        value = e2m1(code.to(tl.int32) << 28)  # the low bits alone
    tl.store(out_ptr + n, value)


def test_every_float_of_few_bits_has_its_value():
    codes, out = torch.arange(256, dtype=torch.uint8), torch.empty(256)
    _values[(1,)](codes, out, KIND="e4m3")
    assert torch.equal(out.nan_to_num(1e9), torch.tensor(fp8.VALUES).nan_to_num(1e9))
    assert out[128].signbit() and not out[0].signbit()  # zeros have a sign
    _values[(1,)](codes, out, KIND="e8m0")
    assert torch.equal(out[:255].double(), 2.0 ** (torch.arange(255, dtype=torch.float64) - 127))
    _values[(1,)](codes, out, KIND="e2m1")
    expected = torch.tensor(mxfp4.VALUES).repeat(16)
    assert torch.equal(out, expected) and torch.equal(out.signbit(), expected.signbit())


@pytest.mark.parametrize("name", FORMATS)
def test_a_coded_stack_is_the_pools_own_memory(name):
    quantized = pool(SIZES[0], name)
    found = coded(quantized, "down")
    assert found.codes.data_ptr() == quantized.down[0].data_ptr()
    assert found.codes.dtype == (torch.int8 if name == "int8" else torch.uint8)
    assert found.columns == 12 and not found.transposed and found.mT.transposed and found.mT.mT == found
    assert (found.values is None) == (name not in ("nf4", "nf4_double"))
    if name != "nf4_double":
        assert found.scales.data_ptr() == quantized.down[1].data_ptr()
    else:
        assert found.scales.dtype == torch.float32 and found.scales.shape == quantized.down[1].shape


def test_of_plain_pools_the_tensors_are_taken():
    trained, frozen = torch.randn(0, 4, 6).mT, torch.randn(3, 4, 6)
    weights = ExpertWeights(frozen, torch.randn(3, 6, 2))
    assert stack(weights, "gate_up") is frozen and stack(weights, "down") is weights.down_EDF
    pointers, sizes, constants = weight_operands(trained, frozen)
    assert pointers[0] is trained and pointers[1] is frozen and pointers[2:] == (None, None)
    assert sizes == (*frozen.stride(), 0, 0) and constants == {
        "FORMAT": "plain",
        "TRANSPOSED": False,
        "LAYOUT": None,
    }
    trained = torch.randn(1, 6, 4).mT
    assert weight_operands(trained, frozen)[1] == (24, 1, 4, 0, 0)


def test_plain_weights_are_loaded_by_descriptors_where_asked_for_and_where_these_can():
    trained, frozen = torch.randn(1, 8, 4), torch.randn(2, 8, 4)
    assert weight_operands(trained, frozen, True)[2]["LAYOUT"] == "out_in"
    assert weight_operands(trained.mT, frozen.mT, True, "in")[2]["LAYOUT"] == "in_out"
    assert weight_operands(trained, frozen, True, "in")[2]["LAYOUT"] is None
    quantized = coded(pool((20, 70, 12), "int8"), "gate_up")
    assert weight_operands(torch.empty(0, 20, 70), quantized, True)[2]["LAYOUT"] is None


def test_a_row_of_codes_is_one_feature_or_the_other():
    found = coded(pool((20, 70, 12), "int8"), "gate_up")
    pointers, sizes, constants = weight_operands(torch.empty(0, 20, 70), found)
    assert pointers[0] is pointers[1] is found.codes and pointers[2:] == (found.scales, None)
    assert sizes == (20 * 128, 70, 1, 20 * 2, 2) and constants == {
        "FORMAT": "int8",
        "TRANSPOSED": False,
        "LAYOUT": None,
    }
    _, sizes, constants = weight_operands(torch.empty(0, 70, 20), found.mT)
    assert sizes[1:3] == (1, 70) and constants["TRANSPOSED"]


@triton.jit
def _corner(codes_ptr, scales_ptr, values_ptr, out_ptr, rows, columns, width, scale_columns, FORMAT: tl.constexpr):
    row, column = tl.arange(0, 16)[:, None], tl.arange(0, 16)[None, :]
    mask = (row < rows) & (column < columns)
    weight = load_weight(codes_ptr, scales_ptr, values_ptr, row, column, width, scale_columns, mask, FORMAT)
    tl.store(out_ptr + row * 16 + column, weight)


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_masked_is_not_read_and_counts_as_zero(name, monkeypatch):
    quantized = pool((20, 70, 12), name, experts=1)
    source = coded(quantized, "gate_up")
    check_bounds(monkeypatch)
    poison_masked(monkeypatch)
    out = torch.full((16, 16), float("nan"))
    _corner[(1,)](
        source.codes, source.scales, source.values, out, 3, 5, source.columns, source.scale_columns,
        FORMAT=source.format,
    )  # fmt: skip
    expected = torch.zeros(16, 16)
    expected[:3, :5] = dequantize(quantized, torch.float32).gate_up_EGD[0, :3, :5]
    assert torch.equal(out, expected)

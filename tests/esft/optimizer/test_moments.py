import math

import pytest
import torch

from esft.optimizer.moments import BLOCK, MOMENTS, EightBitMoments, FloatMoments, decode, encode, signed, unsigned

MAPS = {"signed": signed(), "unsigned": unsigned()}


def drawn(count: int, values: tuple[float, ...]) -> torch.Tensor:
    """Of many magnitudes, as moments are."""
    generator = torch.Generator().manual_seed(count)
    x = torch.randn(count, generator=generator) * 10 ** (2 * torch.randn(count, generator=generator) - 3)
    return x if values[0] < 0 else x.square()


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("count", [1, 2, 255, 256, 257, 511, 1000, 4096])
def test_a_value_comes_back_as_the_nearest_of_256_but_for_rounding_to_bf16_before(name: str, count: int):
    values, table = drawn(count, MAPS[name]), torch.tensor(MAPS[name], dtype=torch.float64)
    codes, absmax = encode(values, MAPS[name])
    assert (codes.dtype, codes.shape) == (torch.uint8, (count,))
    assert (absmax.dtype, absmax.shape) == (torch.float32, (math.ceil(count / BLOCK),))
    scales = torch.cat([block.abs().max().expand(len(block)) for block in values.split(BLOCK)])
    assert torch.equal(absmax, scales[::BLOCK])
    # The twin in float64: the distance of every scaled value to its code's, and to the nearest one.
    scaled = values.double() / scales.double()
    distance, nearest = (table[codes.long()] - scaled).abs(), (table - scaled[:, None]).abs().min(dim=1)
    # bf16 moves a number by 2^-8 of it at most, to and fro: so much farther than the nearest may the code's be.
    assert (distance <= nearest.values + scaled.abs() * 2**-7).all()
    assert (codes == nearest.indices).float().mean() > 0.9 or count < 100
    found = decode(codes, absmax, MAPS[name])
    assert torch.equal(found, table[codes.long()].float() * scales)
    assert torch.equal(encode(found, MAPS[name])[0], codes)


def test_zeros_stay_zero_in_the_mean_and_no_square_becomes_zero():
    values = torch.zeros(300)
    assert torch.equal(decode(*encode(values, signed()), signed()), values)
    assert torch.equal(decode(*encode(values, unsigned()), unsigned()), values)  # of a block that is zero
    values[7] = 2.0
    assert torch.equal(decode(*encode(values, signed()), signed()), values)
    squares = decode(*encode(values, unsigned()), unsigned())
    assert squares[7] == 2.0 and (squares[:BLOCK] > 0).all() and (squares[8:BLOCK] <= 1e-6).all()
    assert not squares[BLOCK:].any()


def test_the_values_are_those_of_bitsandbytes_but_for_the_zero_among_squares():
    functional = pytest.importorskip("bitsandbytes.functional")
    for ours, is_signed in ((signed(), True), (unsigned(), False)):
        theirs = functional.create_dynamic_map(signed=is_signed)
        assert len(set(ours)) == 256 and list(ours) == sorted(ours)
        torch.testing.assert_close(torch.tensor(ours[1:]), theirs[1:], rtol=1e-6, atol=0)
    assert 0 < unsigned()[0] < unsigned()[1] and 0.0 in signed()


@pytest.mark.parametrize("name", MOMENTS)
def test_moments_are_zero_at_first_and_take_the_bytes_that_are_counted(name: str):
    for shape in ((1,), (3, 100), (2, 256), (257,)):
        parameter = torch.randn(shape).bfloat16()
        moments = MOMENTS[name](parameter)
        both = moments.read(slice(0, parameter.numel()))
        assert all(
            part.dtype == torch.float32 and not part.any() and part.shape == (parameter.numel(),) for part in both
        )
        assert sum(t.nbytes for t in moments.tensors().values()) == moments.count_bytes(parameter.numel())
    assert EightBitMoments.count_bytes(1 << 20) < 0.26 * FloatMoments.count_bytes(1 << 20)


@pytest.mark.parametrize("name", MOMENTS)
def test_a_span_that_is_written_leaves_the_others_alone(name: str):
    parameter = torch.zeros(3, 300)
    moments = MOMENTS[name](parameter)
    mean, square = moments.read(slice(0, 900))
    mean.normal_()
    square.normal_().square_()
    moments.write(slice(0, 900), mean, square)
    before = [part.clone() for part in moments.read(slice(0, 900))]
    mean, square = moments.read(slice(256, 768))
    mean.mul_(2)
    square.mul_(4)
    moments.write(slice(256, 768), mean, square)
    for found, was, factor in zip(moments.read(slice(0, 900)), before, (2, 4), strict=True):
        expected = torch.cat([was[:256], factor * was[256:768], was[768:]])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_the_last_span_may_end_within_a_block():
    moments = EightBitMoments(torch.zeros(700))
    mean, square = (part.clone() for part in moments.read(slice(512, 700)))
    moments.write(slice(512, 700), mean + 3.0, square + 5.0)
    mean, square = moments.read(slice(0, 700))
    assert not mean[:512].any() and not square[:512].any()
    assert (mean[512:] == 3.0).all() and (square[512:] == 5.0).all()

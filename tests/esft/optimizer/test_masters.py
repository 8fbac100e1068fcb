import pytest
import torch
from torch import nn

from esft.optimizer.masters import Master, Split, Whole, master_type

SHAPE = (3, 5)
ALL = slice(0, 15)
# Bits of float32: zeros, the largest and the smallest numbers, ties and their neighbours, one above and below.
EDGES = [
    0,
    1,
    0x7FFF,
    0x8000,
    0x8001,
    0x3F800000,
    0x3F808000,
    0x3F818000,
    0x3F80FFFF,
    0x7F7F7FFF,
    0x00800000,
    0x4049_0FDB,
]


def parameter(dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.randn(SHAPE).to(dtype))


def values_of(master: Master, span: slice = ALL) -> torch.Tensor:
    return master.read(span, torch.empty(span.stop - span.start)).clone()


def step(master: Master, span: slice, new: torch.Tensor) -> None:
    """As an optimizer does: read, change in place, write."""
    values = master.read(span, torch.empty(span.stop - span.start))
    master.write(span, values.copy_(new))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_master_begins_as_its_parameter_and_keeps_every_bit_that_is_written(dtype: torch.dtype):
    weight = parameter(dtype)
    master = master_type(dtype)(weight)
    assert torch.equal(values_of(master).view(SHAPE), weight.detach().float())
    for _ in range(3):
        new = torch.randn(15) * 10 ** torch.randn(15)
        before = values_of(master)
        step(master, slice(4, 11), new[4:11])
        assert torch.equal(values_of(master), torch.cat([before[:4], new[4:11], before[11:]]))
        assert torch.equal(weight.detach(), values_of(master).view(SHAPE).to(dtype))


def test_fp16_has_a_float32_copy_that_it_follows():
    weight = parameter(torch.float16)
    master = Whole(weight)
    step(master, ALL, torch.full((15,), 1 + 2**-12))
    assert torch.equal(weight.detach(), torch.ones(SHAPE).half())
    assert torch.equal(values_of(master), torch.full((15,), 1 + 2**-12))


@pytest.mark.parametrize("sign", [0, -(1 << 31)])
def test_a_split_master_holds_any_finite_number_and_its_weight_is_the_nearest_with_ties_away_from_zero(sign: int):
    bits = torch.tensor(EDGES + torch.randint(0, 0x7F7F8000, (4000,)).tolist(), dtype=torch.int64) + sign
    wanted = bits.to(torch.int32).view(torch.float32)
    weight = nn.Parameter(torch.zeros(len(bits), dtype=torch.bfloat16))
    master = Split(weight)
    master.write(slice(0, len(bits)), wanted.clone())
    found = values_of(master, slice(0, len(bits)))
    assert torch.equal(found.view(torch.int32), wanted.view(torch.int32))
    tie = bits % (1 << 16) == 0x8000
    assert tie.sum() >= 3
    assert torch.equal(weight.detach()[~tie], wanted.bfloat16()[~tie])
    above = (wanted[tie].double().abs() - weight.detach()[tie].double().abs()) < 0
    assert above.all()


def test_what_is_beside_a_parameter_is_what_its_master_adds():
    for dtype, size in ((torch.float32, 0), (torch.bfloat16, 2), (torch.float16, 4)):
        weight = parameter(dtype)
        master = master_type(dtype)(weight)
        own = weight.untyped_storage().data_ptr()
        beside = [t for t in master.tensors().values() if t.untyped_storage().data_ptr() != own]
        assert sum(t.nbytes for t in beside) == size * 15 == master.bytes_beside(dtype) * 15


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_its_tensors_make_the_same_master_of_another_parameter(dtype: torch.dtype):
    weight, other = parameter(dtype), parameter(dtype)
    master = master_type(dtype)(weight)
    step(master, ALL, torch.randn(15))
    loaded = master_type(dtype)(other)
    loaded.load(master.tensors())
    assert torch.equal(values_of(loaded), values_of(master)) and torch.equal(other, weight)
    assert all(tensor.shape == SHAPE and not tensor.requires_grad for tensor in master.tensors().values())


def test_a_split_master_is_made_of_a_whole_one_which_stays_as_it_is():
    weight, values = parameter(torch.bfloat16), torch.randn(SHAPE)
    master, given = Split(weight), values.clone()
    master.load({"master": given})
    assert torch.equal(values_of(master).view(SHAPE), values) and torch.equal(given, values)
    assert torch.equal(weight.detach(), values.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_masters_parts_are_its_own_memory_and_all_that_it_is(dtype: torch.dtype):
    weight = parameter(dtype)
    master, span = master_type(dtype)(weight), slice(4, 11)
    step(master, ALL, torch.randn(15))
    part, beside = master.parts(span)
    assert part.data_ptr() == weight[0, 4:].data_ptr() and len(part) == 7
    if beside is None:
        whole = part
    elif beside.dtype == torch.int16:
        whole = ((part.view(torch.int16).int() << 16) + beside).view(torch.float32)
    else:
        whole = beside
    assert torch.equal(whole, values_of(master, span))
    for each in (part, beside) if beside is not None else (part,):
        each.zero_()
    assert not values_of(master, span).any() and values_of(master)[11:].all()

"""What makes the interpreter faster leaves its results, its check for overflow and Triton's language as they were."""

import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl
from triton.runtime import interpreter


@triton.jit
def _tripled(value):
    return value + value + value


@triton.jit
def _kernel(out, value, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(out + offsets, _tripled(_tripled(offsets)) * value)


@triton.jit
def _computed(out, a, b, HOW: tl.constexpr):
    value = tl.load(a)
    other = tl.load(b)
    if HOW == "add":
        value += other
    elif HOW == "sub":
        value -= other
    else:
        value *= other
    tl.store(out, value)


@triton.jit
def _scaled(out, value, BY: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(out + offsets, (tl.load(value + offsets) * BY).to(tl.float32))


@pytest.mark.parametrize("by", [0.0, -0.0, 1, 1.0, True, 2.5, -3])
def test_a_number_beside_a_block_is_itself_whatever_numbers_came_before(by: float):
    for value in (torch.tensor([1.0, -2.0]), torch.tensor([3.0, 4.0]), torch.tensor([5, -6])):
        _scaled[(1,)](out := torch.empty(2), value, by, 2)
        expected = (value * by).float()
        assert torch.equal(out, expected) and torch.equal(out.signbit(), expected.signbit())


def test_functions_within_functions_of_a_kernel_compute_and_the_language_is_as_before():
    own = {name: getattr(tl, name) for name in ("range", "load", "arange", "static_range")}
    for value in (2, -3):
        _kernel[(1,)](out := torch.zeros(8, dtype=torch.int32), value, 8)
        assert out.tolist() == [9 * value * i for i in range(8)]
    assert all(getattr(tl, name) is member for name, member in own.items())


@pytest.mark.parametrize(
    ("how", "a", "b"),
    [("add", 2**31 - 2, 2), ("sub", -(2**31) + 1, 2), ("mul", 2**16, 2**15), ("mul", 2**16, -(2**16))],
)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_a_number_beyond_its_type_is_an_error(how: str, a: int, b: int, dtype: torch.dtype):
    def compute(b: int) -> int:
        out, first, second = (torch.tensor([value], dtype=dtype) for value in (0, a, b))
        _computed[(1,)](out, first, second, how)
        return out.item()

    exact = {"add": lambda b: a + b, "sub": lambda b: a - b, "mul": lambda b: a * b}[how]
    assert compute(1) == exact(1)
    if dtype == torch.int64:
        assert compute(b) == exact(b)
    else:
        with pytest.raises(interpreter.InterpreterError, match=f"int32 overflow detected for operation {how}"):
            compute(b)

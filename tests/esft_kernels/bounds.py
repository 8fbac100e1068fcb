"""Every address that a kernel loads from or stores to in Triton's interpreter, held to the tensors of its launch."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """First byte, and one past the last, that an element of the tensor occupies."""
    elements = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    return tensor.data_ptr(), tensor.data_ptr() + elements * tensor.element_size()


def check_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail a launch that touches a byte outside its tensors, or that stores to a byte twice.

    An overrun of one element often lands in memory that is someone else's and harmless; a second store of the same
    element is a race on a GPU, where programs run side by side.
    """
    extents: list[tuple[int, int]] = []
    stored: list[np.ndarray] = []
    launch = interpreter.GridExecutor.__call__
    load = interpreter.InterpreterBuilder.create_masked_load
    store = interpreter.InterpreterBuilder.create_masked_store

    def checked_launch(self, *args, **kwargs):
        stored.clear()
        extents[:] = [_extent(t) for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor) and t.numel()]
        result = launch(self, *args, **kwargs)
        every = np.concatenate(stored) if stored else np.empty(0)
        assert np.unique(every).size == every.size, "an element is stored twice"
        return result

    def addresses(pointers, mask) -> np.ndarray:
        data = pointers.data.astype(np.int64)
        found = data[np.broadcast_to(mask.data.astype(bool), data.shape)]  # one dimension
        size = pointers.get_element_ty().primitive_bitwidth // 8
        if not found.size or any(first <= found.min() and found.max() + size <= last for first, last in extents):
            return found
        inside = np.zeros(found.shape, dtype=bool)
        for first, last in extents:
            inside |= (found >= first) & (found + size <= last)
        assert inside.all(), f"{(~inside).sum()} addresses outside the tensors of the launch"
        return found

    def checked_load(self, pointers, mask, *args, **kwargs):
        addresses(pointers, mask)
        return load(self, pointers, mask, *args, **kwargs)

    def checked_store(self, pointers, value, mask, *args):
        stored.append(addresses(pointers, mask))
        return store(self, pointers, value, mask, *args)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", checked_launch)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_load", checked_load)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_store", checked_store)


def poison_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A masked load that names no value for what it leaves out gets NaN there, or an absurd number.

    The interpreter would give it zeros; on a GPU it may be anything.
    """
    named = True
    plan, load = TritonSemantic.load, interpreter.InterpreterBuilder.create_masked_load

    def planned_load(self, ptr, mask, other, *args):
        nonlocal named
        named = other is not None
        return plan(self, ptr, mask, other, *args)

    def poisoned_load(self, pointers, mask, other, *args, **kwargs):
        nonlocal named
        result = load(self, pointers, mask, other, *args, **kwargs)
        unnamed, named = not named, True  # a descriptor's loads are not planned: what they leave out is zero anywhere
        if unnamed:
            whole = pointers.get_element_ty().is_int()
            poison = np.iinfo(result.data.dtype).max // 2 if whole else _nan_like(result.data)
            result.data = np.where(mask.data, result.data, poison)
        return result

    monkeypatch.setattr(TritonSemantic, "load", planned_load)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_load", poisoned_load)


def _nan_like(values: np.ndarray) -> np.ndarray:
    """All bits set, which is a NaN in every floating-point format; bf16 is bare bits here."""
    return np.full(values.shape, -1, dtype=f"i{values.dtype.itemsize}").view(values.dtype)


def sparse(path: Path, *shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Zeros, more than memory holds: a file that takes room only where it is written to."""
    return torch.from_file(str(path), shared=True, size=math.prod(shape), dtype=dtype).view(shape)


class Watched:
    """In the place of a kernel: keeps grid and constants of its last launch, which is not done."""

    def __init__(self):
        self.grid, self.constants = (), {}

    def __getitem__(self, grid):
        self.grid = grid
        return lambda *args, **constants: self.constants.update(constants)


def sum_in_one_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """A product's sums have one order, whatever the order of its operands' elements in memory.

    As on a GPU. In the interpreter NumPy multiplies, whose library of some CPUs sums rows and columns differently.
    """
    dot = interpreter.InterpreterBuilder.create_dot

    def ordered(self, a, b, *args):
        for operand in (a, b):
            operand.data = np.ascontiguousarray(operand.data)
        return dot(self, a, b, *args)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", ordered)

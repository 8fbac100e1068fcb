"""Triton's interpreter with the same results and checks in less time, for tests that compute in it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

_EXACT = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


def speed_up() -> None:
    """Leave out what the interpreter does again and again; for all that follows in this process."""
    interpreter._patch_lang = _patched_once(interpreter._patch_lang)
    TritonSemantic.binary_op_sanitize_overflow_impl = _check_overflow


def _patched_once(patch: Callable[..., Any]) -> Callable[..., Any]:
    """Functions that a kernel calls find the language as its launch has left it, and do not change it anew."""
    own_range = {module: module.range for module in (tl, tl.core)}

    def patched(fn: Callable[..., Any]) -> Any:
        modules = [value for value in fn.__globals__.values() if inspect.ismodule(value) and value in own_range]
        if modules and all(module.range is not own_range[module] for module in modules):
            return interpreter._LangPatchScope()
        return patch(fn)

    return patched


def _check_overflow(self: TritonSemantic, lhs: Any, rhs: Any, operation: Callable[..., Any]) -> None:
    """As Triton's own check does, in NumPy instead of interpreted operations."""
    kind = lhs.type.scalar
    if kind.int_bitwidth >= 64:
        return
    exact = _EXACT[operation.__name__](lhs.handle.data.astype(np.int64), rhs.handle.data.astype(np.int64))
    if exact.size and not kind.get_int_min_value() <= exact.min() <= exact.max() <= kind.get_int_max_value():
        raise OverflowError(f"int{kind.int_bitwidth} overflow detected for operation {operation.__name__}")

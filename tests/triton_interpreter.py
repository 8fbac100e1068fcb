"""Triton's interpreter with the same results and checks in less time, for tests that compute in it."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.language import core
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

_EXACT = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


def speed_up() -> None:
    """Leave out what the interpreter does again and again; for all that follows in this process."""
    interpreter._patch_lang = _patched_once(interpreter._patch_lang)
    interpreter._get_np_dtype = _kept_dtype(interpreter._get_np_dtype)
    TritonSemantic.binary_op_sanitize_overflow_impl = _check_overflow
    core._unwrap_if_constexpr = _plain_first(core._unwrap_if_constexpr)
    _keep_block_types()
    _type_tuples_when_asked()
    _bring_together_as_before()
    interpreter._patch_attr = _call_at_once


def _patched_once(patch: Callable[..., Any]) -> Callable[..., Any]:
    """Functions that a kernel calls find the language as its launch has left it, and do not change it anew."""
    own_range = {module: module.range for module in (tl, tl.core)}
    used: dict[str, list[Any]] = {}

    def patched(fn: Callable[..., Any]) -> Any:
        if (modules := used.get(fn.__module__)) is None:
            modules = [value for value in fn.__globals__.values() if inspect.ismodule(value) and value in own_range]
            used[fn.__module__] = modules
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


def _call_at_once(owner: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
    """As the interpreter sets a function of the language, without the copy of its arguments at every call."""
    inner = getattr(member, "__wrapped__", member)  # without the check that ``_semantic`` is given, as it is here
    semantic = interpreter.interpreter_semantic

    def called(*args: Any, **kwargs: Any) -> Any:
        kwargs["_semantic"] = semantic
        return inner(*args, **kwargs)

    scope.set_attr(owner, name, called)


def _kept_dtype(dtype_of: Callable[[Any], np.dtype]) -> Callable[[Any], np.dtype]:
    known: dict[str, np.dtype] = {}

    def kept(type: Any) -> np.dtype:
        scalar = type.scalar
        if scalar.is_ptr():
            return dtype_of(scalar)
        if scalar.name not in known:
            known[scalar.name] = dtype_of(scalar)
        return known[scalar.name]

    return kept


def _plain_first(unwrap: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Most of what is unwrapped is a number in one wrapper, or a tensor in none."""

    def unwrapped(value: Any) -> Any:
        kind = type(value)
        if kind is core.constexpr:
            return value.value
        return value if kind is int or kind is core.tensor else unwrap(value)

    return unwrapped


def _keep_block_types() -> None:
    """Block types of the same elements and shape, and tensors of them, share what follows from these."""
    make_type, make_tensor = core.block_type.__init__, core.tensor.__init__
    known: dict[tuple[Any, ...], dict[str, Any]] = {}

    def init_type(self: core.block_type, element_ty: Any, shape: Any) -> None:
        sizes = [getattr(size, "value", size) for size in shape]
        # A pointer's name does not say its address space.
        key = (type(element_ty), element_ty.name, getattr(element_ty, "address_space", ""), *sizes)
        if (values := known.get(key)) is None:
            make_type(self, element_ty, shape)
            values = known[key] = dict(vars(self), of_tensors={})
        vars(self).update(values)

    of_scalars: dict[str, dict[str, Any]] = defaultdict(dict)

    def init_tensor(self: core.tensor, handle: Any, type: Any) -> None:
        values = type.of_tensors if type.is_block() else {} if type.is_ptr() else of_scalars[type.name]
        if not values:
            make_tensor(self, handle, type)
            values.update({name: vars(self)[name] for name in ("shape", "numel", "dtype")})
        else:
            self.handle, self.type = handle, type
            vars(self).update(values)

    core.block_type.__init__, core.tensor.__init__ = init_type, init_tensor


def _bring_together_as_before() -> None:
    """What has to be done to two operands, for one type and one shape, follows from their types; it is kept."""
    bring = TritonSemantic.binary_op_type_checking_impl
    known: dict[tuple[Any, ...], Any] = {}

    def brought(self: TritonSemantic, lhs: Any, rhs: Any, *how: Any, **options: Any) -> tuple[Any, Any]:
        key = (_operand(lhs), _operand(rhs), how, *options.items())
        if (steps := known.get(key)) is None:
            both = bring(self, lhs, rhs, *how, **options)
            known[key] = _step(self, lhs, both[0]), _step(self, rhs, both[1])
            return both
        return steps[0](lhs), steps[1](rhs)

    TritonSemantic.binary_op_type_checking_impl = brought


def _operand(value: Any) -> Any:
    """What the treatment of an operand follows from: a tensor's type; a number itself."""
    if type(value) is not core.tensor:
        return type(value), value or str(value)  # 0.0 and -0.0 are equal
    kind = value.type
    if kind.is_block():  # those of the same elements and shape share this dictionary, which stays
        return id(kind.of_tensors)
    return (kind.name, kind.address_space) if kind.is_ptr() else kind.name


def _step(semantic: TritonSemantic, operand: Any, result: Any) -> Callable[[Any], Any]:
    """From an operand to its result: itself, the same constant, or the same elements in another type and shape."""
    if operand is result:
        return lambda value: value
    if type(operand) is not core.tensor:
        result.handle.data.flags.writeable = False
        return lambda value: result
    make, dtype, kind = interpreter.TensorHandle, result.dtype, result.type
    shape, element = result.handle.data.shape, result.handle.dtype
    cast = operand.dtype != dtype

    def step(value: Any) -> Any:
        handle = (semantic.cast(value, dtype) if cast else value).handle
        return core.tensor(make(np.broadcast_to(handle.data, shape), element), kind)

    return step


def _type_tuples_when_asked() -> None:
    make = core.tuple.__init__

    def init(self: core.tuple, args: Any, type: Any = None) -> None:
        if type is None:
            self.values = list(args)
        else:
            make(self, args, type)

    def type_of(self: core.tuple) -> Any:
        values = vars(self)
        if "_type" not in values:
            values["_type"] = core._type_for_tuple_values(self.values)
        return values["_type"]

    core.tuple.__init__ = init
    core.tuple.type = property(type_of, lambda self, type: vars(self).update(_type=type))

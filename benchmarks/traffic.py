"""Counting what processes send one another, from the collective operations that they run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

SMALL = 4096  # bytes: what only tells numbers, and no tensor of a model


class Traffic(TorchDispatchMode):
    """Inside, every call of ``torch.distributed`` is counted, PyTorch's own wrappers' included.

    Attributes:
        calls: operation -> how often it ran.
        payload: operation -> bytes of the tensors that a rank gave to it. Whatever does more with them than once, as
            an all-reduce in a ring does, sends more.
        small: bytes among these in operations of at most ``SMALL``.
    """

    def __init__(self):
        super().__init__()
        self.calls, self.payload, self.small = Counter[str](), Counter[str](), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            name = func.overloadpacket.__name__.strip("_")
            size = _given(name, args)
            self.calls[name] += 1
            self.payload[name] += size
            self.small += size if size <= SMALL else 0
        return func(*args, **(kwargs or {}))


# Of these the output comes before the input.
_OUTPUT_FIRST = frozenset(
    "allgather allgather_base allgather_into_tensor_coalesced reduce_scatter reduce_scatter_base "
    "reduce_scatter_tensor_coalesced gather scatter alltoall alltoall_base".split()
)


def _given(name: str, args: tuple) -> int:
    """Bytes that this rank contributes: not those of the room for what others do."""
    if name == "barrier":
        return 0
    given = args[1] if name in _OUTPUT_FIRST else args[0]
    return sum(tensor.nbytes for tensor in _tensors(given))


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Iterable):
        for each in value:
            yield from _tensors(each)

"""What tensors take, and took at most, while something runs: on real tensors or on fake ones."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from math import inf
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.weak import WeakIdKeyDictionary


class TooMany(Exception):
    """More operations than were allowed."""


class LiveBytes(TorchDispatchMode):
    """Counts the memory of all tensors that come into being inside the block, and of their gradients.

    What PyTorch's kernels take for themselves and give back is not seen.

    Args:
        known: tensors of before, which are not counted, nor are views of them.

    Attributes:
        now, peak: bytes.
        left: how many more operations may be done; TooMany is raised at the next.
    """

    def __init__(self, known: Iterable[Tensor] = ()):
        super().__init__()
        self.now = self.peak = 0
        self.left = inf
        self._known = WeakIdKeyDictionary()
        for tensor in known:
            self._known[tensor.untyped_storage()] = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= 1
        if self.left < 0:
            raise TooMany
        out = func(*args, **(kwargs or {}))
        for each in tree_iter(out):
            if isinstance(each, Tensor):
                self._count(each.untyped_storage())
        return out

    def _count(self, storage: Any) -> None:
        if storage in self._known:
            return
        self._known[storage] = None
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, size)

    def _gone(self, size: int) -> None:
        self.now -= size

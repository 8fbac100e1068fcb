"""What memory was taken and is free, and one clear error where a model does not fit."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch

from esft.errors import OutOfMemory, asked_for
from esft.parallel.environment import local_size

Named = TypeVar("Named", bound=tuple[str, Any])
_GROUPS, _OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def peak_memory() -> int:
    """Largest memory that tensors took on the GPUs so far, bytes in all; 0 without one."""
    if not torch.cuda.is_available():
        return 0
    return sum(torch.cuda.max_memory_allocated(device) for device in range(torch.cuda.device_count()))


def peak_rss() -> int:
    """The process's largest resident memory so far, bytes; 0 where the system does not tell."""
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def free_memory() -> int:
    """Bytes that this process could take yet: what is free or can be freed, swap included, within its control group.

    Of several processes that ``torchrun`` has started on this machine, each has a share.
    """
    system = psutil.virtual_memory().available + psutil.swap_memory().free
    return min([system, *_left_of_groups()]) // local_size()


def _left_of_groups() -> Iterator[int]:
    """What the limits of this process's control groups leave, of either version; pages of files can be freed."""
    try:
        groups = [line.split(":") for line in _OWN_GROUPS.read_text().splitlines()]
    except OSError:
        return
    for _, controllers, path in groups:
        first = _GROUPS / "memory" if controllers == "memory" else _GROUPS
        limit, used = ("memory.limit_in_bytes", "total_rss") if controllers == "memory" else ("memory.max", "anon")
        # A container sees its own group as the root.
        for folder in (first / path.lstrip("/"), first) if controllers in ("", "memory") else ():
            try:
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                yield int((folder / limit).read_text()) - int(stat[used])
            except (OSError, ValueError, KeyError):  # no such group, or "max"
                continue


def check_fits(path: str, needed: int) -> None:
    """Raise OutOfMemory where a model's weights, of so many bytes, cannot be in the memory that is free."""
    if needed > (free := free_memory()):
        raise OutOfMemory(f"{path}: its weights take {_gb(needed)}, and {_gb(free)} are free; {_advice(path, free)}")


@contextmanager
def memory_watched(path: str) -> Iterator[Callable[[Iterable[Named]], Iterator[Named]]]:
    """Inside, an allocation that fails becomes one error that says what would fit.

    What is handed out passes tensors on and remembers the last one, which the error then names.
    """
    last: list[str] = []

    def reads(tensors: Iterable[Named]) -> Iterator[Named]:
        for tensor in tensors:
            last[:] = [tensor[0]]
            yield tensor

    try:
        yield reads
    except OutOfMemory:
        raise
    except (MemoryError, RuntimeError) as error:  # PyTorch's own is a RuntimeError
        asked = asked_for(error)
        if asked is None and not isinstance(error, MemoryError | torch.OutOfMemoryError):
            raise
        what = f"memory ran out at tensor {last[0]}" if last else "memory ran out"
        more = "" if asked is None else f": {asked:,} bytes more were asked for"
        raise OutOfMemory(f"{path}: {what}{more}; {_advice(path, free_memory())}") from error


def _advice(path: str, free: int) -> str:
    return f"esft plan --model {path} --memory-gb {max(1, free // 10**9)} says what to change"


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"

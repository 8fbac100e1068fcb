"""Where a model goes, and the dtype that it computes in there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

from esft.parallel.environment import size_of_job

_in_host_memory = ContextVar("in_host_memory", default=False)


@contextmanager
def in_host_memory(wanted: bool) -> Iterator[None]:
    """Inside, a model stays in the CPU's memory where that is wanted, whatever GPUs there are."""
    before = _in_host_memory.set(wanted)
    try:
        yield
    finally:
        _in_host_memory.reset(before)


def placement() -> dict[str, Any]:
    """What ``from_pretrained`` is told: all of a model on the GPU, or its layers over several; nothing on a CPU.

    Of several processes each has a whole model, on the GPU that is its own. ``CUDA_VISIBLE_DEVICES`` chooses among the
    GPUs, and hides them all when it is empty.
    """
    if not torch.cuda.is_available() or _in_host_memory.get():
        return {}
    if size_of_job() > 1:
        return {"device_map": {"": first_device()}}
    return {"device_map": "cuda" if torch.cuda.device_count() == 1 else "auto"}


def on_one_device() -> bool:
    """Whether ``placement`` puts all of a model in one place."""
    return placement().get("device_map") != "auto"


def first_device() -> torch.device:
    """Where ``placement`` puts a model, or its first layers."""
    if _in_host_memory.get():
        return torch.device("cpu")
    if torch.cuda.is_available() and size_of_job() > 1:
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def compute_dtype(dtype: str) -> str:
    """The dtype to load in: ``auto``, the checkpoint's, is float32 on a CPU that has no bf16 arithmetic.

    PyTorch computes 16-bit products there all the same, but more slowly than it does float32.
    """
    if dtype == "auto" and not torch.cuda.is_available() and not _has_bf16():
        return "float32"
    return dtype


def _has_bf16() -> bool:
    """Whether the CPU multiplies bf16: amx_bf16, avx512_bf16, and Arm's extensions end alike."""
    return any(has and name.endswith("bf16") for name, has in torch.cpu.get_capabilities().items())

"""Which backend computes on a device."""

from __future__ import annotations

import importlib
import os
from typing import cast

import torch

from esft_kernels.backend import Backend

BACKENDS = ("auto", "triton", "cpu", "cpu_packed", "reference")


def resolve_backend(backend: str, device: torch.device) -> Backend:
    """The module that computes ``forward`` and ``backward`` on this device.

    ``auto`` is Triton on a GPU and the CPU path elsewhere; ``cpu_packed`` is a faster CPU path that takes three times
    the frozen weights' memory. Raises ValueError for a name that is not a backend and for a backend that cannot run on
    the device.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "auto":
        backend = "cpu" if device.type == "cpu" else "triton"
    if backend.startswith("cpu") and device.type != "cpu":
        raise ValueError(f"backend {backend!r} computes on CPU tensors, got tensors on {device}")
    if backend == "cpu_packed" and not torch.backends.mkldnn.is_available():
        raise ValueError("backend 'cpu_packed' needs a PyTorch with oneDNN, which this one is not")
    if backend == "triton":
        if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError("backend 'triton' on CPU tensors needs TRITON_INTERPRET=1 set before Python starts")
        try:
            return _module("triton_backend")
        except ModuleNotFoundError as error:
            if error.name != "triton":
                raise
            raise ValueError("backend 'triton' needs the triton package, which is not installed here") from error
    return _module(backend)


def _module(name: str) -> Backend:
    return cast(Backend, importlib.import_module(f"esft_kernels.backends.{name}"))

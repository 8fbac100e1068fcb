"""Runs our code on tensors that only claim to lie on GPUs: an operation on two devices at once is an error.

PyTorch can give its spare device type to no hardware at all, and fake tensors on it compute nothing but shapes and
devices. That changes the whole process, so ``test_device`` runs this as one of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
from accelerate.hooks import attach_align_device_hook_on_blocks
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import backend_registration
from triton.runtime.jit import JITFunction

import esft
from esft.evaluation.loss import batch_loss, has_plain_head
from esft.selection import ExpertSelection
from esft_kernels.backend import Needs
from esft_kernels.backends import triton_backend
from esft_kernels.pools import ExpertPools, ExpertWeights
from esft_kernels.routing import Routing, route
from esft_kernels.triton_ops import tiles
from tests.esft.models import tiny_model

MODE = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)


class _TwoGPUs(backend_registration._DummyBackendModule):
    def device_count(self) -> int:
        return 2


def _move(module: nn.Module, device: str) -> None:
    for part in module.modules():
        for name, p in list(part.named_parameters(recurse=False)):
            fake = MODE.from_tensor(p.detach()).to(device)
            part._parameters[name] = nn.Parameter(fake, requires_grad=p.requires_grad)
        for name, b in list(part.named_buffers(recurse=False)):
            part._buffers[name] = MODE.from_tensor(b).to(device)


def _swapped() -> nn.Module:
    model = esft.swap(tiny_model(), ExpertSelection({1: [0, 1], 2: [3]}))
    has_plain_head(model)  # needs values, so before they are gone
    return model


@contextmanager
def _traced() -> Iterator[None]:
    """Our experts as the operator that torch.compile sees, and labels found without looking at them."""
    with MODE, ExitStack() as stack:
        where, batch_labels = torch.where, (torch.zeros(5, dtype=torch.long), torch.arange(5))
        stack.enter_context(patch.object(torch.compiler, "is_compiling", lambda: True))
        stack.enter_context(patch.object(torch, "where", lambda *args: where(*args) if args[1:] else batch_labels))
        yield


def _loss(model: nn.Module) -> torch.Tensor:
    ids = torch.arange(16).view(2, 8)
    return batch_loss(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids})[0]


def one_gpu() -> None:
    model = _swapped()
    with _traced():
        _move(model, "gpu:0")
        _loss(model).backward()
    assert {str(p.grad.device) for p in model.parameters() if p.grad is not None} == {"gpu:0"}


def layers_over_two_gpus() -> None:
    """Spread as accelerate spreads a model whose experts are exchanged afterwards."""
    places = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.layers.0": 0, "model.layers.1": 0}
    places |= {"model.layers.2": 1, "model.norm": 1, "lm_head": 0}
    devices = {name: f"gpu:{number}" for name, number in places.items()}
    model = _swapped()
    with _traced():
        for name, device in devices.items():
            _move(model.get_submodule(name), device)
        attach_align_device_hook_on_blocks(model, {"": "gpu:0", **devices}, dict.fromkeys(devices, False))
        assert str(_loss(model).device) == "gpu:0"


def triton_launches() -> None:
    """Everything that a kernel is handed lies on the GPU."""

    def launch(self, *args, grid, warmup, **kwargs) -> None:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        assert tensors and {str(tensor.device) for tensor in tensors} == {"gpu:1"}

    def on_gpu(*size: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="gpu:1")

    def check(s: int, e: int, t: int = 8, k: int = 2, d: int = 32, f: int = 16) -> None:
        pool = (ExpertWeights(on_gpu(n, 2 * f, d), on_gpu(n, d, f), on_gpu(n, 2 * f), on_gpu(n, d)) for n in (s, e - s))
        pools, long = ExpertPools(*pool), torch.int64
        routing = route(on_gpu(t, k, dtype=long), on_gpu(e, dtype=long), s)
        assert isinstance(routing, Routing)
        x, weights = on_gpu(t, d), on_gpu(t, k, dtype=torch.float32)
        out, h = triton_backend.forward(x, weights, pools, routing, t * k)
        h = triton_backend.rebuild(x, h[:3], pools, routing)
        grads = triton_backend.backward(out, x, h, weights, pools, routing, Needs(True, True, True))
        assert grads.x_TD is not None and str(grads.x_TD.device) == "gpu:1"

    with ExitStack() as stack:
        stack.enter_context(MODE)
        stack.enter_context(patch.object(JITFunction, "run", launch))
        stack.enter_context(patch.object(tiles, "device_arch", lambda device: "sm_90"))
        for s, e in ((2, 4), (0, 4), (4, 4)):
            check(s, e)


if __name__ == "__main__":
    backend_registration._setup_privateuseone_for_python_backend("gpu", backend_module=_TwoGPUs())
    one_gpu()
    layers_over_two_gpus()
    triton_launches()

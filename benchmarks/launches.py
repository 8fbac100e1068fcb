"""How many kernels one layer launches, counted on tensors without values: no GPU is needed, and nothing is computed.

What would wait for the device (``item``, ``tolist``, ``nonzero`` and the like) is an error here, as there is no value
to wait for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import JITFunction
from triton.runtime.interpreter import GridExecutor

from benchmarks.layer import chosen_experts
from benchmarks.shapes import LayerShape
from esft_kernels.compiled_op import routed_mlp
from esft_kernels.formats.resolve import FORMATS
from esft_kernels.pools import PLAIN, ExpertPools, ExpertWeights, QuantizedWeights
from esft_kernels.triton_ops import tiles

TOKENS = 4096


class _Operators(TorchDispatchMode):
    """PyTorch's operators, but for those that launch nothing: views, and memory without values."""

    def __init__(self, found: list[str]):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and not func.name().startswith(("aten::empty", "aten::new_empty", "aten::detach")):
            self.found.append(func.name())
        return func(*args, **(kwargs or {}))


@contextmanager
def counting(arch: str = "sm_90") -> Iterator[list[str]]:
    """Inside, Triton's kernels are not run but named in the list, and so are PyTorch's operators that launch something.

    For tensors on "meta", as if they were on a GPU of this architecture.
    """
    found: list[str] = []

    def compiled(self, *args, **kwargs) -> None:
        found.append(self.fn.__name__.strip("_"))

    with ExitStack() as stack:
        stack.enter_context(patch.object(JITFunction, "run", compiled))
        stack.enter_context(patch.object(GridExecutor, "__call__", compiled))
        stack.enter_context(patch.object(tiles, "device_arch", lambda device: arch))
        stack.enter_context(_Operators(found))
        yield found


def count(shape: LayerShape, tokens: int = TOKENS, format: str = PLAIN, arch: str = "sm_90") -> dict[str, list[str]]:
    """What a layer launches from the router's choice to its output, ``forward``, and from there back, ``backward``.

    All gradients are taken: of the input, the routing weights and the trained pool. ``format``: of the frozen pool.
    """

    def meta(*size: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    d, f, e, k, s = shape.hidden, shape.intermediate, shape.experts, shape.top_k, chosen_experts(shape)
    g = f * shape.activation.width

    def plain(n: int) -> ExpertWeights:
        biases = (meta(n, g), meta(n, d)) if shape.gpt_oss_layout else ()
        if shape.gpt_oss_layout:
            return ExpertWeights(meta(n, d, g).mT, meta(n, f, d).mT, *biases)
        return ExpertWeights(meta(n, g, d), meta(n, d, f), *biases)

    trained, frozen = plain(s), plain(e - s)
    for tensor in trained.tensors():
        if tensor is not None:
            tensor.requires_grad_()
    if format != PLAIN:
        stacks = (
            tuple(meta(*size, dtype=kind) for size, kind in FORMATS[format].layout(e - s, *matrix).values())
            for matrix in ((g, d), (d, f))
        )
        frozen = QuantizedWeights(format, (g, d, f), *stacks, frozen.gate_up_bias_EG, frozen.down_bias_ED)
    pools = ExpertPools(trained, frozen, shape.activation, shape.gpt_oss_layout)
    x_TD, weights_TK = meta(tokens, d).requires_grad_(), meta(tokens, k, dtype=torch.float32).requires_grad_()
    index_TK, position_E = meta(tokens, k, dtype=torch.int64), meta(e, dtype=torch.int64)
    wanted = [t for t in (x_TD, weights_TK, *trained.tensors()) if t is not None]
    with counting(arch) as forward:
        out_TD = routed_mlp(x_TD, index_TK, weights_TK, position_E, pools, "triton")
    with counting(arch) as backward:
        torch.autograd.grad(out_TD, wanted, meta(tokens, d))
    return {"forward": forward, "backward": backward}


def rows(shape: LayerShape, tokens: int = TOKENS) -> list[dict]:
    """A row for each pass: how many launches there are, and of what."""
    return [
        {"shape": shape.name, "tokens": tokens, "pass": name, "launches": len(found), "of": ", ".join(found)}
        for name, found in count(shape, tokens).items()
    ]

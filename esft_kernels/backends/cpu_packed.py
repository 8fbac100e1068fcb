"""The experts on a CPU, with the frozen pool packed once into the layout that the matrix units read.

oneDNN rearranges plain weights at every product, which costs about a sixth of the time at a few hundred rows an
expert. Frozen experts never change, so here they are rearranged once. A product and its transpose want different
layouts: with the plain ones, which stay for saving and for ``unswap``, the frozen weights take three times their
memory. The functions are those of ``reference``.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from esft_kernels.backends import cpu
from esft_kernels.backends.cpu import FACTORS, Products
from esft_kernels.pools import ExpertPools, ExpertWeights, QuantizedWeights

_ROWS = 256  # what the layout is chosen for


class _Packed(Products):
    """Packed weights for the frozen positions, plain ones for the trained."""

    def __init__(self, pools: ExpertPools):
        if isinstance(pools.frozen, QuantizedWeights):
            raise ValueError(f"backend 'cpu_packed' packs plain weights, got {pools.format}, which 'cpu' computes")
        super().__init__(pools)
        self.packed = _packed(pools)

    def __call__(self, factor: str, position: int, rows: Tensor, out: Tensor) -> None:
        if position < self.pools.num_trained or rows.dtype == torch.float16:  # oneDNN packs no fp16 everywhere
            super().__call__(factor, position, rows, out)
            return
        weight = self.packed[position - self.pools.num_trained][factor]
        out.copy_(torch.ops.mkldnn._linear_pointwise(rows, weight, None, "none", [], ""))


def _packed(pools: ExpertPools) -> list[dict[str, Tensor]]:
    """The packed weights of every frozen expert; made once, and again after the plain ones were written to.

    They are kept on the tensor that holds the plain ones, and go with it.
    """
    assert isinstance(pools.frozen, ExpertWeights)
    weights = (pools.frozen.gate_up_EGD, pools.frozen.down_EDF)
    holder = weights[0] if weights[0]._base is None else weights[0]._base
    # Views of one memory may have other experts, or the same numbers the other way round.
    state = tuple((t.data_ptr(), t._version, t.dtype, t.shape, t.stride()) for t in weights)
    kept = getattr(holder, "esft_packed", None)
    if kept is None or kept[0] != state:
        plain = Products(pools)
        with torch.no_grad():
            made = [
                {name: _pack(plain.factor(name, position)) for name in FACTORS}
                for position in range(pools.num_trained, pools.num_experts)
            ]
        holder.esft_packed = kept = (state, made)
    return kept[1]


def _pack(factor_IO: Tensor) -> Tensor:
    if factor_IO.dtype == torch.float16:
        return factor_IO
    return torch.ops.mkldnn._reorder_linear_weight(factor_IO.T.contiguous(), _ROWS)


route = cpu.route
forward = partial(cpu.forward, products=_Packed)
rebuild = partial(cpu.rebuild, products=_Packed)
backward = partial(cpu.backward, products=_Packed)

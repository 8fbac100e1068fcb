"""Triton: which experts a launch computes, and where it reads their weights.

Plain pools are one launch for all. Of quantized ones the trained experts are a launch of their own. The frozen ones are
decoded first, a few experts at a time, into a scratch that the plain kernels read. Only with far fewer rows than
experts they are one more launch, which decodes weights as it loads them, and never reads those of experts without rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod

from torch import Tensor

from esft_kernels.pools import ExpertPools, ExpertWeights, Projection, QuantizedWeights
from esft_kernels.routing import Routing
from esft_kernels.triton_ops.decode import decode

# An expert. Loads decode only where a batch has far fewer rows than experts, as in generating a token: most experts are
# not used then, and not read. With a row an expert and more the scratch was faster on an H200 (docs/performance.md);
# that it is not with an eighth of one is reckoned from the time of an expert.
FEW_ROWS = 1 / 8
SCRATCH = 128 << 20  # bytes; less than a layer's pool of any model that is worth quantizing, and several experts


@dataclass(frozen=True)
class Part:
    """Neighbouring positions that are computed together.

    Attributes:
        pools: their weights; of a scratch, the projection asked for only.
        routing: the whole one, but for ``offsets_E1`` and ``num_trained``, which are of these positions.
        rows_per_expert: about how many rows an expert of the layer has; None where the part is the whole.
    """

    pools: ExpertPools
    routing: Routing
    rows_per_expert: int | None


def parts(pools: ExpertPools, routing: Routing, projection: Projection, first: int = 0) -> Iterator[Part]:
    """All positions from ``first`` on, which is 0 or S, part by part; each is good until the next is asked for."""
    s, offsets, frozen = routing.num_trained, routing.offsets_E1, pools.frozen

    if isinstance(frozen, ExpertWeights) and not first:
        yield Part(pools, routing, None)
        return

    def part(start: int, end: int, rows: int | None, **changes: ExpertWeights | QuantizedWeights) -> Part:
        here = replace(routing, offsets_E1=offsets[start : end + 1], num_trained=max(s - start, 0))
        return Part(replace(pools, **changes), here, rows)

    if isinstance(frozen, ExpertWeights):
        yield part(first, routing.num_experts, None)
        return
    few, rows = routing.num_rows <= FEW_ROWS * routing.num_experts, routing.num_rows // max(routing.num_experts, 1)
    none = ExpertWeights(*(None if t is None else t[:0] for t in pools.trained.tensors()))  # pyright: ignore[reportArgumentType]
    if first < s:
        yield part(first, s, rows, frozen=none)
    if frozen.num_experts and few:
        yield part(s, routing.num_experts, rows)
    elif frozen.num_experts:
        size = frozen.size(projection)
        like = pools.trained.gate_up_EGD
        most = max(1, min(frozen.num_experts, SCRATCH // (prod(size) * like.dtype.itemsize)))
        scratch = like.new_empty(most, *size)
        for start in range(0, frozen.num_experts, most):
            end = min(start + most, frozen.num_experts)
            decode(frozen, projection, start, scratch[: end - start])
            yield part(s + start, s + end, rows, frozen=_decoded(frozen, projection, scratch, none, start, end))


def _decoded(
    frozen: QuantizedWeights, projection: Projection, scratch: Tensor, none: ExpertWeights, start: int, end: int
) -> ExpertWeights:
    biases = (None if t is None else t[start:end] for t in (frozen.gate_up_bias_EG, frozen.down_bias_ED))
    here = scratch[: end - start]
    matrices = (here, none.down_EDF) if projection == "gate_up" else (none.gate_up_EGD, here)
    return ExpertWeights(*matrices, *biases)

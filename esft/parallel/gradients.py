"""The one thing of size that ranks send one another: the gradients of what trains, once a step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

BUCKET = 25 << 20  # bytes that travel together, as in PyTorch's DistributedDataParallel


def add_up(parameters: Sequence[nn.Parameter]) -> None:
    """Replace every gradient by its sum over all ranks, in its own dtype; collective, of the default process group.

    A parameter that a rank has no gradient for counts as zeros there; one without a gradient on every rank keeps none,
    as in a single process.
    """
    present = torch.tensor([p.grad is not None for p in parameters], dtype=torch.uint8)
    dist.all_reduce(present, dist.ReduceOp.MAX)
    for p, has in zip(parameters, present.tolist(), strict=True):
        if has and p.grad is None:
            p.grad = torch.zeros_like(p)
    for bucket in _buckets([p.grad for p in parameters if p.grad is not None]):
        if len(bucket) == 1 and bucket[0].is_contiguous():
            dist.all_reduce(bucket[0])
            continue
        flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
        dist.all_reduce(flat)
        for gradient, added in zip(bucket, flat.split([gradient.numel() for gradient in bucket]), strict=True):
            gradient.copy_(added.view_as(gradient))


def _buckets(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours of one dtype and device, of ``BUCKET`` bytes in all; a larger gradient is alone."""
    bucket: list[Tensor] = []
    for gradient in gradients:
        kind = (gradient.dtype, gradient.device)
        if bucket and (
            kind != (bucket[0].dtype, bucket[0].device) or sum(g.nbytes for g in bucket) + gradient.nbytes > BUCKET
        ):
            yield bucket
            bucket = []
        bucket.append(gradient)
    if bucket:
        yield bucket

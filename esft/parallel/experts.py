"""Experts dealt out over ranks: each holds some of every layer's, and computes them for the tokens of all.

A layer's tokens go to every rank, and of what the ranks make of them each gets the sums for its own tokens (all-gather
and reduce-scatter, as in Megatron-LM's all-gather dispatcher). Twice that in the backward, the other way round. So rows
of data are dealt out as without, and a trained expert gets its whole gradient where it is: it is sent nowhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from esft.errors import InputError
from esft.parallel.ranks import Ranks

Compute = Callable[[Tensor, Tensor, Tensor], Tensor]  # x [T, D], expert ids [T, K], routing weights [T, K] -> [T, D]


@dataclass(frozen=True)
class Deal:
    """Which experts of a layer each rank holds, by their ids.

    Attributes:
        rank: this one.
        trained: of every rank; one after the other they are all that train, in their order.
        frozen: of every rank.
    """

    rank: int
    trained: tuple[tuple[int, ...], ...]
    frozen: tuple[tuple[int, ...], ...]

    @property
    def held(self) -> tuple[int, ...]:
        """What this rank holds, what trains first."""
        return self.trained[self.rank] + self.frozen[self.rank]

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many each rank trains."""
        return tuple(map(len, self.trained))


def deal_experts(trained: Sequence[int], num_experts: int, ranks: Ranks, turn: int) -> Deal:
    """A layer's experts, of which no rank gets one more than another but for a remainder; the same of those that train.

    Args:
        trained: ids.
        turn: the layer's place in the model: who gets what is left over changes from layer to layer.
    """
    n, chosen = ranks.size, set(trained)
    frozen = [expert for expert in range(num_experts) if expert not in chosen]
    parts: list[list[tuple[int, ...]]] = [[], []]
    for rank in range(n):
        early = (rank - turn) % n  # to get one of what is left over
        all_here, trained_here = (count // n + (early < count % n) for count in (num_experts, len(trained)))
        for part, ids, count in zip(parts, (trained, frozen), (trained_here, all_here - trained_here), strict=True):
            first = sum(map(len, part))
            part.append(tuple(ids[first : first + count]))
    return Deal(ranks.rank, tuple(parts[0]), tuple(parts[1]))


class NoReplicas:
    """What ``DistributedDataParallel`` looks up first of a model, the names to leave alone: of dealt experts, an error.

    It would give all ranks the experts of the first one, and add up gradients of experts that are not the same.
    """

    def __iter__(self) -> Iterator[str]:
        raise InputError(
            "the experts are dealt out over processes, and DistributedDataParallel takes all to have the same: "
            "esft.training.dealt_trainer.DealtTrainer is a Trainer for them, and so is esft train --shard experts"
        )


@torch.compiler.disable
def exchanged(deal: Deal, compute: Compute, x_TD: Tensor, index_TK: Tensor, weights_TK: Tensor, nobody: int) -> Tensor:
    """What all experts of a layer make of this rank's tokens, [T, D]; collective, and its backward is.

    Args:
        compute: what those make of any tokens that are here.
        x_TD: [T, D]; another T on every rank.
        index_TK: integer [T, K], expert ids.
        weights_TK: [T, K].
        nobody: an id that no expert has.

    On every rank gradients have to be asked for alike. Raises RankError outside of the job that the deal is for.
    """
    from esft.parallel.join import job_of  # not above: that imports transformers, which may import this

    ranks = job_of(len(deal.sizes))
    longest = ranks.largest(len(x_TD), "a layer's experts")
    x_XD, weights_XK = _Gather.apply(ranks, longest, x_TD, weights_TK)  # pyright: ignore[reportGeneralTypeIssues]
    index_XK = ranks.gather(_padded(index_TK, longest, nobody))
    return _Sum.apply(ranks, len(x_TD), compute(x_XD, index_XK, weights_XK))  # pyright: ignore[reportReturnType]


def _padded(rows: Tensor, count: int, value: int = 0) -> Tensor:
    """With so many rows, as all ranks' have to be as many."""
    return F.pad(rows, (0, 0, 0, count - len(rows)), value=value).contiguous()


class _Gather(torch.autograd.Function):
    """The rows of all ranks, [T, ...] -> [X, ...]."""

    @staticmethod
    def forward(ctx, ranks, longest, *tensors):  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.ranks, ctx.tokens = ranks, len(tensors[0])
        return tuple(ranks.gather(_padded(t, longest)) for t in tensors)

    @staticmethod
    def backward(ctx, *gradients):  # pyright: ignore[reportIncompatibleMethodOverride]
        needs = ctx.needs_input_grad[2:]
        both = zip(gradients, needs, strict=True)
        return None, None, *(ctx.ranks.scatter_sum(g.contiguous())[: ctx.tokens] if n else None for g, n in both)


class _Sum(torch.autograd.Function):
    """The sums of this rank's rows, of what all ranks made of them, [X, D] -> [T, D]."""

    @staticmethod
    def forward(ctx, ranks, tokens, rows):  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.ranks, ctx.longest = ranks, len(rows) // ranks.size
        # Saved on every rank, so that layers which are made again in the backward are made up to here on all of them.
        ctx.save_for_backward(rows[:0])
        return ranks.scatter_sum(rows.contiguous())[:tokens]

    @staticmethod
    def backward(ctx, gradient):  # pyright: ignore[reportIncompatibleMethodOverride]
        _ = ctx.saved_tensors
        return None, None, ctx.ranks.gather(_padded(gradient, ctx.longest))

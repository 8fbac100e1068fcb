"""The two pools of expert weights: trained, and frozen, which may be quantized."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from esft_kernels.activation import SWIGLU, Activation
from esft_kernels.formats.format import Format
from esft_kernels.formats.resolve import resolve_format
from esft_kernels.routing import expert_order

Projection = Literal["gate_up", "down"]
PLAIN = "plain"  # in place of a format: weights are what they are


@dataclass(frozen=True)
class ExpertWeights:
    """Stacked weights of some experts, or, from ``ExpertPools.at``, of one (without the first dimension).

    G is 2F for gated experts, F for others. Strides are free, so the transpose of a [E, D, G] tensor is a view.
    """

    gate_up_EGD: Tensor
    down_EDF: Tensor
    gate_up_bias_EG: Tensor | None = None
    down_bias_ED: Tensor | None = None

    @property
    def num_experts(self) -> int:
        return self.gate_up_EGD.shape[0]

    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.gate_up_EGD, self.down_EDF, self.gate_up_bias_EG, self.down_bias_ED

    def matrix(self, projection: Projection, index: int, buffer: Tensor | None = None) -> Tensor:
        """One expert's gate_up [G, D] or down [D, F], a view; the buffer is for pools whose weights are no tensor."""
        return (self.gate_up_EGD if projection == "gate_up" else self.down_EDF)[index]


@dataclass(frozen=True)
class QuantizedWeights:
    """The same of frozen experts, kept in few bits. A matrix is made from them where it is needed, one at a time.

    Attributes:
        format: its name, see ``esft_kernels.formats``.
        shape: (G, D, F) of one expert; the matrices are [G, D] and [D, F], whatever the layout they came in.
        gate_up, down: the tensors of the two stacks, as ``Format.layout`` orders them.
        gate_up_bias_EG, down_bias_ED: in the dtype that is computed in.
    """

    format: str
    shape: tuple[int, int, int]
    gate_up: tuple[Tensor, ...]
    down: tuple[Tensor, ...]
    gate_up_bias_EG: Tensor | None = None
    down_bias_ED: Tensor | None = None

    @property
    def kind(self) -> Format:
        return resolve_format(self.format)

    @property
    def num_experts(self) -> int:
        return self.gate_up[0].shape[0]

    def tensors(self) -> tuple[Tensor | None, ...]:
        return *self.gate_up, *self.down, self.gate_up_bias_EG, self.down_bias_ED

    def size(self, projection: Projection) -> tuple[int, int]:
        """Rows and columns of one expert's matrix."""
        g, d, f = self.shape
        return (g, d) if projection == "gate_up" else (d, f)

    def stack(self, projection: Projection) -> tuple[Tensor, ...]:
        return self.gate_up if projection == "gate_up" else self.down

    def buffer(self, dtype: torch.dtype) -> Tensor:
        """Memory for one matrix, whichever; ``matrix`` fills it."""
        size = max(self.kind.buffer_size(*self.size("gate_up")), self.kind.buffer_size(*self.size("down")))
        return self.gate_up[0].new_empty(size, dtype=dtype)

    def matrix(self, projection: Projection, index: int, buffer: Tensor) -> Tensor:
        """One expert's gate_up [G, D] or down [D, F], in the buffer, which must be of ``buffer``'s size."""
        parts = [tensor[index] for tensor in self.stack(projection)]
        return self.kind.decode(parts, *self.size(projection), buffer)

    def check(self) -> None:
        """Raise ValueError naming what does not fit the format and the shape, or holds a scale that is no number."""
        for projection in ("gate_up", "down"):
            self.kind.check(self.stack(projection), self.num_experts, *self.size(projection), projection)
            self.kind.check_values(self.stack(projection), projection)


def quantize(weights: ExpertWeights, name: str) -> QuantizedWeights:
    """A pool in the format of this name; biases stay as they are.

    Raises ValueError for a format that is not known, or cannot hold the weights.
    """
    kind, (_, d, f) = resolve_format(name), weights.down_EDF.shape
    stacks = kind.quantize(weights.gate_up_EGD), kind.quantize(weights.down_EDF)
    return QuantizedWeights(
        name, (weights.gate_up_EGD.shape[1], d, f), *stacks, weights.gate_up_bias_EG, weights.down_bias_ED
    )


def dequantize(pool: QuantizedWeights, dtype: torch.dtype) -> ExpertWeights:
    """The weights of a whole pool, written out."""
    buffer, stacks = pool.buffer(dtype), []
    for projection in ("gate_up", "down"):
        stack = buffer.new_empty(pool.num_experts, *pool.size(projection))
        for index, matrix in enumerate(stack):
            matrix.copy_(pool.matrix(projection, index, buffer))
        stacks.append(stack)
    return ExpertWeights(*stacks, pool.gate_up_bias_EG, pool.down_bias_ED)


@dataclass(frozen=True)
class ExpertPools:
    """One layer's experts, split into the trained pool (S) and the frozen pool (R = E - S).

    A pool may hold no expert (first dimension 0). All tensors share one dtype, but for quantized ones, and one device;
    both pools have biases or neither has. The rows of ``gate_up`` are all gates before all ups, or (gate, up) in turn
    when ``interleaved``.
    """

    trained: ExpertWeights
    frozen: ExpertWeights | QuantizedWeights
    activation: Activation = SWIGLU
    interleaved: bool = False

    @property
    def num_trained(self) -> int:
        return self.trained.gate_up_EGD.shape[0]

    @property
    def num_experts(self) -> int:
        return self.num_trained + self.frozen.num_experts

    @property
    def hidden_size(self) -> int:
        return self.trained.gate_up_EGD.shape[2]

    @property
    def intermediate_size(self) -> int:
        return self.trained.down_EDF.shape[2]

    @property
    def gate_up_size(self) -> int:
        """G, the columns of H."""
        return self.intermediate_size * self.activation.width

    def at(self, position: int) -> ExpertWeights:
        """Weights of the expert at this position: [G, D], [D, F], and the biases [G] and [D] or None."""
        pool, index = self.locate(position)
        dtype = self.trained.gate_up_EGD.dtype
        matrices = (
            pool.matrix(name, index, pool.buffer(dtype))
            if isinstance(pool, QuantizedWeights)
            else pool.matrix(name, index)
            for name in ("gate_up", "down")
        )
        biases = (pool.gate_up_bias_EG, pool.down_bias_ED)
        return ExpertWeights(*matrices, *(None if t is None else t[index] for t in biases))

    def locate(self, position: int) -> tuple[ExpertWeights | QuantizedWeights, int]:
        """The pool of the expert at this position, and its index there."""
        s = self.num_trained
        return (self.trained, position) if position < s else (self.frozen, position - s)

    def tensors(self) -> tuple[Tensor | None, ...]:
        """The trained pool's four tensors, then the frozen pool's."""
        return *self.trained.tensors(), *self.frozen.tensors()

    @property
    def format(self) -> str:
        """Of the frozen pool; ``plain`` where it is not quantized."""
        return self.frozen.format if isinstance(self.frozen, QuantizedWeights) else PLAIN

    def split(self, h_NG: Tensor) -> tuple[Tensor, Tensor | None]:
        """Gate and up views of pre-activations whose columns are ordered like the rows of ``gate_up``."""
        if not self.activation.gated:
            return h_NG, None
        if self.interleaved:
            return h_NG[..., 0::2], h_NG[..., 1::2]
        gate, up = h_NG.chunk(2, dim=-1)
        return gate, up


def pools_of(tensors: Sequence[Tensor | None], activation: Activation, interleaved: bool, format: str) -> ExpertPools:
    """The pools whose ``tensors`` and ``format`` these are."""
    trained, rest = ExpertWeights(*tensors[:4]), tensors[4:]  # pyright: ignore[reportArgumentType]
    if format == PLAIN:
        frozen = ExpertWeights(*rest)  # pyright: ignore[reportArgumentType]
    else:
        shape = (*trained.gate_up_EGD.shape[1:], trained.down_EDF.shape[2])
        count = (len(rest) - 2) // 2
        frozen = QuantizedWeights(format, shape, tuple(rest[:count]), tuple(rest[count:-2]), *rest[-2:])  # pyright: ignore[reportArgumentType]
    return ExpertPools(trained, frozen, activation, interleaved)


def split_pools(
    weights: ExpertWeights, trained: Sequence[int], activation: Activation = SWIGLU, interleaved: bool = False
) -> ExpertPools:
    """Pools with copies of stacked weights, which are ordered by expert id; each lies in memory as what it is of.

    Args:
        weights: of all E experts.
        trained: ids of the trained pool, in its order.

    Raises ValueError for an id that is repeated or out of range.
    """
    order, s = expert_order(trained, len(weights.down_EDF)), len(trained)
    pools = (
        ExpertWeights(*(None if t is None else _taken(t, ids) for t in weights.tensors()))
        for ids in (order[:s], order[s:])
    )
    return ExpertPools(*pools, activation, interleaved)


def _taken(stack: Tensor, ids: list[int]) -> Tensor:
    """A copy of some experts, laid out as all are: on its own a GPU lays out few of a transposed stack otherwise."""
    if stack.dim() == 3 and not stack.is_contiguous() and stack.mT.is_contiguous():
        return stack.mT[ids].mT
    return stack[ids]

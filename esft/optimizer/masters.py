"""The float32 values that a training steps, whatever dtype the model computes in: its masters.

bf16 keeps 8 bits of a value: a step of 1e-5 on a weight of 0.05 would vanish without them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn


class Master(Protocol):
    """The master of one parameter, which has to be contiguous. Spans are of its flattened elements."""

    def __init__(self, parameter: nn.Parameter): ...

    def read(self, span: slice, buffer: Tensor) -> Tensor:
        """Float32 [n]: the master's own memory, or the buffer [n], filled."""
        ...

    def write(self, span: slice, values: Tensor) -> None:
        """Take over what ``read`` gave and a step has changed; the parameter follows. Spoils the values."""
        ...

    def parts(self, span: slice) -> tuple[Tensor, Tensor | None]:
        """The parameter's elements [n], and what the master has beside them: ``esft_kernels.adamw`` steps both."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """What it is made of, by names for files, each in the parameter's shape; no copies."""
        ...

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what ``tensors`` gave, of this kind of master or of a ``Whole`` one."""
        ...

    @staticmethod
    def bytes_beside(dtype: torch.dtype) -> int:
        """Bytes an element that it takes beside a parameter of this dtype."""
        ...


class Whole:
    """A float32 copy; a parameter that is float32 already is its own."""

    def __init__(self, parameter: nn.Parameter):
        self.parameter = parameter.detach()
        self.values = self.parameter.float()  # the same memory where it is float32
        self.is_copy = parameter.dtype != torch.float32

    def read(self, span: slice, buffer: Tensor) -> Tensor:
        return self.values.view(-1)[span]

    def write(self, span: slice, values: Tensor) -> None:
        if self.is_copy:
            self.parameter.view(-1)[span] = values

    def parts(self, span: slice) -> tuple[Tensor, Tensor | None]:
        return self.parameter.view(-1)[span], self.values.view(-1)[span] if self.is_copy else None

    def tensors(self) -> dict[str, Tensor]:
        return {"master": self.values}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        self.values.copy_(tensors["master"])
        if self.is_copy:
            self.parameter.copy_(self.values)

    @staticmethod
    def bytes_beside(dtype: torch.dtype) -> int:
        return 0 if dtype == torch.float32 else 4


class Split:
    """Of a bf16 parameter: the 16 bits of float32 that it lacks, as signed numbers.

    Weight and low bits, added up as integers, are the float32's bits: nothing is lost, and nothing is kept twice. So
    the weight is its master rounded to nearest; a tie goes away from zero, where PyTorch's conversion goes to even.
    """

    def __init__(self, parameter: nn.Parameter):
        self.parameter = parameter.detach()
        self.low_bits = torch.zeros_like(self.parameter, dtype=torch.int16)

    def read(self, span: slice, buffer: Tensor) -> Tensor:
        bits = buffer.view(torch.int32).copy_(self._high_bits[span])
        bits.bitwise_left_shift_(16).add_(self.low_bits.view(-1)[span])
        return buffer

    def write(self, span: slice, values: Tensor) -> None:
        bits = values.view(torch.int32)
        self.low_bits.view(-1)[span] = bits  # the lower half: 0x8000 and above becomes negative
        self._high_bits[span] = bits.add_(0x8000).bitwise_right_shift_(16)

    def parts(self, span: slice) -> tuple[Tensor, Tensor | None]:
        return self.parameter.view(-1)[span], self.low_bits.view(-1)[span]

    @property
    def _high_bits(self) -> Tensor:
        return self.parameter.view(-1).view(torch.int16)

    def tensors(self) -> dict[str, Tensor]:
        return {"weight": self.parameter, "low_bits": self.low_bits}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        if "master" in tensors:
            self.write(slice(None), tensors["master"].to(self.parameter.device, copy=True).view(-1))
        else:
            self.parameter.copy_(tensors["weight"])
            self.low_bits.copy_(tensors["low_bits"])

    @staticmethod
    def bytes_beside(dtype: torch.dtype) -> int:
        return 2


def master_type(dtype: torch.dtype) -> type[Master]:
    """The kind of master that parameters of a dtype have."""
    return Split if dtype == torch.bfloat16 else Whole

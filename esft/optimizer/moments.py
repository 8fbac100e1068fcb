"""Adam's two moments of a parameter, the mean gradient and the mean squared gradient: in float32, or in 8 bits.

In 8 bits, every block of 256 elements is scaled by its largest one and rounded to the nearest of 256 values that lie
close together near zero (arXiv 2110.02861, dynamic quantisation). The values are those of bitsandbytes' optimizers but
for one: there is no zero among those for squares. A square that became zero would leave the next step, should its
gradient be zero, a mean gradient over nothing but epsilon: and gradients are zero wherever an expert got no token.

Rounded here in PyTorch: bitsandbytes 0.50 rounds on a CPU to steps of 1/32768 of a block's largest, zeros included, so
that two of five moments get another code than the nearest, in twice the time.
"""

from __future__ import annotations

from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from esft_kernels.formats.format import blocks_of
from esft_kernels.formats.tables import look_up, pairs

BLOCK = 256


class Moments(Protocol):
    """Both moments of a parameter, zero at first. Spans are of its flattened elements, and start with a block."""

    def __init__(self, parameter: Tensor): ...

    def read(self, span: slice) -> tuple[Tensor, Tensor]:
        """Float32 [n] each, mean and square: their own memory, or new."""
        ...

    def write(self, span: slice, mean: Tensor, square: Tensor) -> None:
        """Take over what ``read`` gave and a step has changed."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """What they are made of, by names for files; no copies."""
        ...

    @staticmethod
    def count_bytes(elements: int) -> int:
        """Bytes that both take."""
        ...


class FloatMoments:
    """In float32, in the parameter's shape."""

    def __init__(self, parameter: Tensor):
        self.mean, self.square = (torch.zeros_like(parameter, dtype=torch.float32) for _ in range(2))

    def read(self, span: slice) -> tuple[Tensor, Tensor]:
        return self.mean.view(-1)[span], self.square.view(-1)[span]

    def write(self, span: slice, mean: Tensor, square: Tensor) -> None:
        pass

    def tensors(self) -> dict[str, Tensor]:
        return {"exp_avg": self.mean, "exp_avg_sq": self.square}

    @staticmethod
    def count_bytes(elements: int) -> int:
        return 2 * 4 * elements


class EightBitMoments:
    """Codes [n] and the largest absolute value of every block, in one dimension each; the last block may be short."""

    def __init__(self, parameter: Tensor):
        count, device = parameter.numel(), parameter.device
        # The code of zero is irrelevant where a block's scale is zero.
        self.mean, self.square = (
            (torch.zeros(count, dtype=torch.uint8, device=device), torch.zeros(blocks_of(count, BLOCK), device=device))
            for _ in range(2)
        )

    def read(self, span: slice) -> tuple[Tensor, Tensor]:
        return decode(*_within(self.mean, span), signed()), decode(*_within(self.square, span), unsigned())

    def write(self, span: slice, mean: Tensor, square: Tensor) -> None:
        for part, values, new in ((self.mean, signed(), mean), (self.square, unsigned(), square)):
            for kept, changed in zip(_within(part, span), encode(new, values), strict=True):
                kept.copy_(changed)

    def tensors(self) -> dict[str, Tensor]:
        names = ("exp_avg", self.mean), ("exp_avg_sq", self.square)
        return {f"{name}_{part}": t for name, both in names for part, t in zip(("codes", "absmax"), both, strict=True)}

    @staticmethod
    def count_bytes(elements: int) -> int:
        return 2 * (elements + 4 * blocks_of(elements, BLOCK))


MOMENTS: dict[str, type[Moments]] = {"adamw": FloatMoments, "adamw_8bit": EightBitMoments}


def _within(part: tuple[Tensor, Tensor], span: slice) -> tuple[Tensor, Tensor]:
    codes, absmax = part
    return codes[span], absmax[span.start // BLOCK : blocks_of(span.stop, BLOCK)]


def encode(values_N: Tensor, code_values: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """Codes uint8 [N] and scales float32 [N / BLOCK, rounded up] of float32 values.

    A scaled value is rounded to bf16 first, whose 65,536 values are looked up: next to the middle of two code values,
    by 2^-8 of it, the farther one may be taken.
    """
    count = values_N.numel()
    blocks = torch.nn.functional.pad(values_N, (0, -count % BLOCK)) if count % BLOCK else values_N
    blocks = blocks.view(-1, BLOCK)
    absmax = blocks.abs().amax(dim=1)
    scaled = blocks.div(absmax.clamp_min(torch.finfo(torch.float32).tiny)[:, None]).bfloat16()
    index = scaled.view(-1)[:count].view(torch.uint16).int()
    return _codes(code_values, values_N.device).index_select(0, index), absmax


def decode(codes_N: Tensor, absmax: Tensor, code_values: tuple[float, ...]) -> Tensor:
    """Float32 [N] of what ``encode`` gave."""
    count = codes_N.numel()
    codes = torch.nn.functional.pad(codes_N, (0, -count % BLOCK)) if count % BLOCK else codes_N
    values = look_up(codes.view(torch.uint16), pairs(code_values, False, codes.device))
    values.view(-1, BLOCK).mul_(absmax[:, None])
    return values[:count]


@cache
def _codes(code_values: tuple[float, ...], device: torch.device) -> Tensor:
    """uint8 [65536]: the code of the value that is nearest to each bf16 number, by the number's bits."""
    values = torch.tensor(code_values, dtype=torch.float64)
    numbers = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).double().nan_to_num()
    return torch.bucketize(numbers, (values[1:] + values[:-1]) / 2).to(torch.uint8).to(device)


@cache
def signed() -> tuple[float, ...]:
    """256 values in ascending order, of [-1, 1]: zero, one, and the middles of 2**i equal parts of every decade."""
    middles = _middles(0)
    return tuple(sorted([*middles, *(-v for v in middles), 0.0, 1.0]))


@cache
def unsigned() -> tuple[float, ...]:
    """256 values in ascending order, of (0, 1]: the middles of 2**(i + 1) equal parts of every decade, one, and half
    the smallest middle."""
    middles = _middles(1)
    return tuple(sorted([*middles, middles[0] / 2, 1.0]))


def _middles(more_bits: int) -> list[float]:
    """Seven decades from 1e-7 up to 1; the i-th is cut into 2**(i + more_bits) parts of one length."""
    found = []
    for i in range(7):
        parts = 2 ** (i + more_bits)
        found += [10.0 ** (i - 6) * (0.1 + 0.9 * (part + 0.5) / parts) for part in range(parts)]
    return found

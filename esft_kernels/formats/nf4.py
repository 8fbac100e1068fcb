"""nf4: 4-bit codes of the normal distribution's quantiles, a float32 scale for every 64 weights (arXiv 2305.14314).

4.5 bits a weight; relative error 9.2% on normal weights (root mean square). The layout is bitsandbytes' in plain
tensors: a matrix row after row, two codes a byte, the first in the high bits. ``nf4_double`` keeps the scales in 8 bits
(4.13 in all), as differences from their mean with a float32 scale for every 256 of them.

Where bitsandbytes is installed it decodes on a CPU, several times as fast as a lookup in PyTorch, to the same bits.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

from esft_kernels.formats.format import PIECE, Format, Stored, blocks_of, scale_for, scale_into
from esft_kernels.formats.tables import bins_of, count_below, look_up, pairs

BLOCK, NESTED = 64, 256
VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_EDGES = tuple(((torch.tensor(VALUES[1:]) + torch.tensor(VALUES[:-1])) / 2).tolist())  # between codes


class Nf4(Format):
    """Blocks run over the ends of rows; the last one of a matrix is padded with zeros."""

    name = "nf4"

    def layout(self, experts: int, rows: int, columns: int) -> dict[str, Stored]:
        blocks = blocks_of(rows * columns, BLOCK)
        return {
            "codes": Stored((experts, blocks * BLOCK // 2), torch.uint8),
            "absmax": Stored((experts, blocks), torch.float32),
        }

    def encode(self, weight_OI: Tensor) -> tuple[Tensor, ...]:
        flat = weight_OI.reshape(-1)
        whole = torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK))
        codes = torch.empty(whole.numel() // 2, dtype=torch.uint8, device=whole.device)
        absmax, bins = whole.new_empty(whole.numel() // BLOCK), bins_of(_EDGES, whole.device)
        pieces = zip(whole.split(PIECE), codes.split(PIECE // 2), absmax.split(PIECE // BLOCK), strict=True)
        for piece, code, scale in pieces:
            blocks = piece.view(-1, BLOCK)
            torch.amax(blocks.abs(), dim=-1, out=scale)
            scaled = blocks / scale.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
            two = count_below(scaled.view(-1), bins).view(-1, BLOCK)
            code.view(-1, BLOCK // 2).copy_(two[:, 0::2] << 4 | two[:, 1::2])
        return codes, absmax

    def buffer_size(self, rows: int, columns: int) -> int:
        return blocks_of(rows * columns, BLOCK) * BLOCK

    def scales(self, parts: Sequence[Tensor]) -> Tensor:
        """float32 absmax, [..., blocks], from the tensors of one matrix or of a stack."""
        return parts[1]

    def decode(self, parts: Sequence[Tensor], rows: int, columns: int, out: Tensor) -> Tensor:
        codes, absmax = parts[0], self.scales(parts)
        library = bitsandbytes() if codes.device.type == "cpu" and out.dtype != torch.float64 else None
        if library is not None:
            out = library(codes, absmax, out.dtype)
        else:
            whole, table = out[: 2 * codes.numel()], pairs(VALUES, True, codes.device)
            pieces = zip(codes.split(PIECE // 2), absmax.split(PIECE // BLOCK), whole.split(PIECE), strict=True)
            for code, scale, piece in pieces:
                scale_into(piece, look_up(code, table), scale, BLOCK)
        return out[: rows * columns].view(rows, columns)


class Nf4Double(Nf4):
    """nf4 with scales in 8 bits."""

    name = "nf4_double"

    def layout(self, experts: int, rows: int, columns: int) -> dict[str, Stored]:
        codes, absmax = super().layout(experts, rows, columns).values()
        return {
            "codes": codes,
            "absmax": Stored(absmax.shape, torch.int8),
            "absmax_scales": Stored((experts, blocks_of(absmax.shape[1], NESTED)), torch.float32),
            "absmax_mean": Stored((experts,), torch.float32),
        }

    def encode(self, weight_OI: Tensor) -> tuple[Tensor, ...]:
        codes, absmax = super().encode(weight_OI)
        mean = absmax.mean()
        apart = torch.nn.functional.pad(absmax - mean, (0, -absmax.numel() % NESTED)).view(-1, NESTED)
        scales = scale_for(apart.abs().amax(dim=-1), 127)
        rounded = (apart / scales.clamp_min(torch.finfo(torch.float32).tiny)[:, None]).round_()
        return codes, rounded.to(torch.int8).view(-1)[: absmax.numel()], scales, mean

    def scales(self, parts: Sequence[Tensor]) -> Tensor:
        _, absmax, scales, mean = parts
        return absmax * scales.repeat_interleave(NESTED, dim=-1)[..., : absmax.shape[-1]] + mean[..., None]


Decoder = Callable[[Tensor, Tensor, torch.dtype], Tensor]


@cache
def bitsandbytes() -> Decoder | None:
    """What decodes on a CPU through bitsandbytes, to memory of its own; None where it is not installed."""
    try:
        with _quiet_and_offline():
            importlib.import_module("bitsandbytes")
    except ImportError:
        return None

    def decode(codes: Tensor, absmax: Tensor, dtype: torch.dtype) -> Tensor:
        # A block a row: with AVX-512 its kernel is wrong for rows that end within a block (bitsandbytes 0.50).
        shape = [absmax.numel(), BLOCK]
        return torch.ops.bitsandbytes.dequantize_4bit(codes, absmax, BLOCK, "nf4", shape, dtype).view(-1)

    return decode


@contextmanager
def _quiet_and_offline():
    """Inside, bitsandbytes finds no ``kernels`` package, through which its import would ask the hub for one more.

    That one multiplies with packed weights, which is not used here; that it is missing would be logged.
    """
    logger, absent = logging.getLogger("bitsandbytes.backends.cpu.ops"), object()
    disabled, before = logger.disabled, sys.modules.get("kernels", absent)
    logger.disabled = True
    sys.modules["kernels"] = None  # pyright: ignore[reportArgumentType]
    try:
        yield
    finally:
        logger.disabled = disabled
        if before is absent:
            del sys.modules["kernels"]
        else:
            sys.modules["kernels"] = before  # pyright: ignore[reportArgumentType]

"""mxfp4: 4-bit floats (e2m1), a power of two for every 32 weights of a row, as gpt-oss ships its experts.

4.25 bits a weight; relative error 11.5% on normal weights (root mean square), and none on weights that came in it. The
layout is OCP's Microscaling Formats 1.0 with two codes a byte, the first in the low bits. A checkpoint's ``*_blocks``
[E, O, I / 32, 16] and ``*_scales`` [E, O, I / 32] are what is kept here: they are [out, in] although the bf16 weights
of the same model are transposed, and the rows of ``gate_up`` are (gate, up) in turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from esft_kernels.formats.format import PIECE, Format, Stored, blocks_of, padded, scale_into
from esft_kernels.formats.tables import bins_of, count_below, look_up, pairs

BLOCK, BIAS, NAN = 32, 127, 255
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_MIDDLES = torch.tensor([(low + high) / 2 for low, high in pairwise(MAGNITUDES)])
# Ties go to the even code, as in IEEE arithmetic; so a middle above an odd code belongs to the code above it.
_EDGES = tuple(torch.where(torch.arange(7) % 2 == 1, _MIDDLES.nextafter(torch.zeros(7)), _MIDDLES).tolist())
VALUES = (*MAGNITUDES, *(-value for value in MAGNITUDES))  # by code: the high bit is the sign


class Mxfp4(Format):
    """Rows that 32 does not divide end in a padded block; checkpoints have none."""

    name = "mxfp4"

    def layout(self, experts: int, rows: int, columns: int) -> dict[str, Stored]:
        blocks = blocks_of(columns, BLOCK)
        return {
            "blocks": Stored((experts, rows, blocks, BLOCK // 2), torch.uint8),
            "scales": Stored((experts, rows, blocks), torch.uint8),
        }

    def encode(self, weight_OI: Tensor) -> tuple[Tensor, ...]:
        blocks = padded(weight_OI, BLOCK)
        # frexp gives 2**e > |w| >= 2**(e - 1); the largest code, 6, is of exponent 2.
        exponent = torch.frexp(blocks.abs().amax(dim=-1)).exponent - 1 - 2
        scales = (exponent + BIAS).clamp_min_(0).to(torch.uint8)
        scaled = (blocks / _powers(scales)[..., None]).contiguous()
        codes = count_below(scaled.abs().view(-1), bins_of(_EDGES, scaled.device)).view(scaled.shape)
        codes |= scaled.signbit().view(torch.uint8) << 3
        return codes[..., 0::2] | codes[..., 1::2] << 4, scales

    def buffer_size(self, rows: int, columns: int) -> int:
        return rows * blocks_of(columns, BLOCK) * BLOCK

    def decode(self, parts: Sequence[Tensor], rows: int, columns: int, out: Tensor) -> Tensor:
        codes, scales = (part.reshape(-1) for part in parts)
        out, table = out[: 2 * codes.numel()], pairs(VALUES, False, codes.device)
        pieces = zip(codes.split(PIECE // 2), scales.split(PIECE // BLOCK), out.split(PIECE), strict=True)
        for code, scale, piece in pieces:
            scale_into(piece, look_up(code, table), _powers(scale), BLOCK)
        return out.view(rows, blocks_of(columns, BLOCK) * BLOCK)[:, :columns]

    def check_values(self, tensors: Sequence[Tensor], name: str) -> None:
        if (tensors[1] == NAN).any():
            raise ValueError(f"{name}: a scale of {self.name} is not finite")


def _powers(scales: Tensor) -> Tensor:
    """float32 ``2 ** (scale - 127)``: the scale is the exponent's bits, but for 0, which is a subnormal number."""
    return (scales.int() << 23).clamp_min_(1 << 22).view(torch.float32)

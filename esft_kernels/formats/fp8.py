"""fp8: 8-bit floats (e4m3), a float32 scale for every 128 x 128 weights, as DeepSeek-V3 ships its weights.

8 bits a weight; relative error 2.6% on normal weights (root mean square), and none on weights that came in it. A
checkpoint's ``weight`` and ``weight_scale_inv`` are what is kept here (DeepSeek-V3, inference/kernel.py: the weight is
their product). Blocks are counted from a matrix's first row: gate and up projections that a checkpoint keeps apart can
be stacked into one matrix, and their scales with them, where 128 divides their rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from esft_kernels.formats.format import Format, Stored, blocks_of, scale_for
from esft_kernels.formats.tables import look_up, pairs

BLOCK = 128
LARGEST = torch.finfo(torch.float8_e4m3fn).max
VALUES = tuple(torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().tolist())


class Fp8(Format):
    """Blocks at the lower and right edge may be short, as in checkpoints."""

    name = "fp8"

    def layout(self, experts: int, rows: int, columns: int) -> dict[str, Stored]:
        return {
            "weight": Stored((experts, rows, columns), torch.float8_e4m3fn),
            "scale_inv": Stored((experts, blocks_of(rows, BLOCK), blocks_of(columns, BLOCK)), torch.float32),
        }

    def encode(self, weight_OI: Tensor) -> tuple[Tensor, ...]:
        rows, columns = weight_OI.shape
        whole = torch.nn.functional.pad(weight_OI, (0, -columns % BLOCK, 0, -rows % BLOCK))
        blocks = whole.view(whole.shape[0] // BLOCK, BLOCK, -1, BLOCK)
        scales = scale_for(blocks.abs().amax(dim=(1, 3)), LARGEST)
        scaled = blocks / scales.clamp_min(torch.finfo(torch.float32).tiny)[:, None, :, None]
        codes = scaled.to(torch.float8_e4m3fn)
        return codes.view(whole.shape)[:rows, :columns], scales

    def decode(self, parts: Sequence[Tensor], rows: int, columns: int, out: Tensor) -> Tensor:
        codes, scales = parts
        out = out[: rows * columns].view(rows, columns)
        for first in range(0, rows, BLOCK):
            strip = slice(first, first + BLOCK)
            scale_I = scales[first // BLOCK].repeat_interleave(BLOCK)[:columns]
            out[strip] = _values(codes[strip]).mul_(scale_I)
        return out


def _values(codes: Tensor) -> Tensor:
    """float32; PyTorch's own conversion is several times slower than the table on a CPU."""
    if codes.shape[1] % 2 or codes.device.type != "cpu":
        return codes.float()
    table = pairs(VALUES, False, codes.device)
    return look_up(codes.view(torch.uint16).reshape(-1), table).view(codes.shape)

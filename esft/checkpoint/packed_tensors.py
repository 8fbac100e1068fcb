"""Weights that a checkpoint ships in few bits: fp8 as DeepSeek-V3 has it, and mxfp4 as gpt-oss has it.

Each is a tensor of codes and one of scales in the files, under names of their own. Together they are one weight, which
the kernels' formats hold as it is. Where it is read, it is what transformers makes of it when it loads such a
checkpoint without a GPU: code times scale in float32, rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from esft.errors import InputError
from esft.storage.files import TensorInfo
from esft.storage.reading import shown
from esft_kernels.formats.fp8 import BLOCK
from esft_kernels.formats.resolve import resolve_format

# Format -> the ends of the names of codes and scales; without them it is the weight's name.
ENDS = {"fp8": ("", "_scale_inv"), "mxfp4": ("_blocks", "_scales")}
CODES = {"fp8": "F8_E4M3", "mxfp4": "U8"}  # the codes' dtype by a safetensors file's name


def packed_format(config: PreTrainedConfig, where: str) -> str | None:
    """The format of a checkpoint's packed weights; None where it has none.

    Raises InputError for a quantization that is not one of ``ENDS``; ``where`` is for messages.
    """
    if (settings := _quantization(config)) is None:
        return None
    method = settings["quant_method"]
    if not isinstance(method, str) or method not in ENDS:
        raise InputError(f"{where}: weights quantized by {shown(method)} are not supported; {' and '.join(ENDS)} are")
    if method == "fp8" and settings.get("weight_block_size") != [BLOCK, BLOCK]:
        found = shown(settings.get("weight_block_size"))
        raise InputError(f"{where}: fp8 with weight_block_size {found} is not supported, only [{BLOCK}, {BLOCK}]")
    return method


def _quantization(config: PreTrainedConfig) -> dict[str, Any] | None:
    """What a configuration says of its weights' quantization, with its method by name; None where it says nothing."""
    parts = (config, config.get_text_config())
    said = next((found for part in parts if (found := getattr(part, "quantization_config", None))), None)
    if said is None:
        return None
    settings: dict[str, Any] = said if isinstance(said, dict) else said.to_dict()
    method = settings.get("quant_method")
    return settings | {"quant_method": getattr(method, "value", method)}


def check_pairs(config: PreTrainedConfig, tensors: Mapping[str, TensorInfo], path: str | Path) -> None:
    """Raise InputError for codes without scales or scales without codes, and for both where the configuration names
    another format, or none: they would be read as weights of their own."""
    method = (_quantization(config) or {}).get("quant_method")
    for name, (codes, scales) in ENDS.items():
        coded = {
            n.removesuffix(codes) for n, info in tensors.items() if n.endswith(codes) and info.dtype == CODES[name]
        }
        scaled = {n.removesuffix(scales) for n in tensors if n.endswith(scales)}
        if method != name and (both := coded & scaled):
            raise InputError(f"{path}: tensor {min(both)} is in {name}, and config.json has no quantization_config so")
        if method == name and (alone := coded ^ scaled):
            has, lacks = ("codes", "scales") if min(alone) in coded else ("scales", f"codes in {CODES[name]}")
            raise InputError(f"{path}: tensor {min(alone)} has {has} of {name} and no {lacks}")


@dataclass(frozen=True)
class PackedTensor:
    """One weight in few bits.

    Attributes:
        format: its name, see ``esft_kernels.formats``.
        parts: codes and scales as the files have them: of one matrix [out, in] in fp8, of a stack of them in mxfp4.
    """

    format: str
    parts: tuple[Tensor, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight; gpt-oss has its stacks as [E, in, out]."""
        codes = self.parts[0]
        return tuple(codes.shape) if self.format == "fp8" else (codes.shape[0], codes[0, 0].numel() * 2, codes.shape[1])

    def matrices(self) -> list[tuple[Tensor, ...]]:
        """Codes and scales of each matrix, in the format's layout."""
        return [self.parts] if self.format == "fp8" else list(zip(*(part.unbind() for part in self.parts), strict=True))

    def read(self, index: int | None = None) -> Tensor:
        """The weight, or one of a stack, in float32 and memory of its own: to be rounded by whoever copies it."""
        if index is None and self.format != "fp8":
            return torch.stack([self.read(each) for each in range(len(self.parts[0]))])
        kind, parts = resolve_format(self.format), self.matrices()[index or 0]
        size = self.shape[::-1][:2] if self.format != "fp8" else self.shape
        out = torch.empty(kind.buffer_size(*size))
        matrix = kind.decode(parts, *size, out)
        return matrix if self.format == "fp8" else matrix.mT.contiguous()

    def pieces(self) -> Iterator[Tensor]:
        """All values in order, a matrix at a time."""
        yield from (self.read(index).view(-1) for index in range(len(self.matrices())))

    def check(self, name: str) -> None:
        """Raise InputError, which begins with ``name``, for parts that do not fit each other or hold no numbers."""
        codes, kind = self.parts[0], resolve_format(self.format)
        if codes.dim() != (2 if self.format == "fp8" else 4) or not codes.numel():
            raise InputError(f"{name}: codes of shape {tuple(codes.shape)} are no weight in {self.format}")
        size = self.shape[::-1][:2] if self.format != "fp8" else self.shape
        stack = self.parts if self.format != "fp8" else tuple(part[None] for part in self.parts)
        try:
            kind.check(stack, len(stack[0]), *size, name)
            kind.check_values(stack, name)
        except ValueError as error:
            raise InputError(str(error)) from error


Named = tuple[str, Tensor | PackedTensor]  # a checkpoint's tensor

"""Formats by their names."""

from __future__ import annotations

from esft_kernels.formats.format import Format
from esft_kernels.formats.fp8 import Fp8
from esft_kernels.formats.int8 import Int8
from esft_kernels.formats.mxfp4 import Mxfp4
from esft_kernels.formats.nf4 import Nf4, Nf4Double

FORMATS: dict[str, Format] = {f.name: f for f in (Int8(), Nf4(), Nf4Double(), Fp8(), Mxfp4())}


def resolve_format(name: str) -> Format:
    """The format of this name. Raises ValueError for one that is not known."""
    if name not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {name!r}")
    return FORMATS[name]

"""How numbers are written for people."""

from __future__ import annotations

import math
from typing import Any

from esft.errors import LONGEST
from esft.runs.metrics import LARGEST
from esft.storage.reading import shown


def figure(value: Any) -> str:
    """A number with as many digits as say something; a text as it is, anything else as Python writes it, cut."""
    if type(value) not in (int, float) or not abs(value) <= LARGEST:
        return value if isinstance(value, str) and len(value) <= LONGEST else shown(value)
    if isinstance(value, int):
        return f"{value:,}" if abs(value) < 1e15 else f"{value:.3e}"
    if 1e-3 <= abs(value) < 1e6:
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:.3g}"


def share(value: float) -> str:
    """Of 1, in per cent."""
    return f"{100 * value:.1f}%"


def size(count: float) -> str:
    """Bytes, in units of powers of 1000."""
    power = min(int(math.log10(count)) // 3, 4) if count >= 1 else 0
    return f"{count / 1000**power:.{0 if power == 0 else 1}f} {('bytes', 'kB', 'MB', 'GB', 'TB')[power]}"

"""Where the tests of this folder run: on a GPU, or as a rehearsal, on small sizes in Triton's interpreter.

The interpreter and the compiler cannot be had in one process, and ``TRITON_INTERPRET`` decides: ``make test-gpu`` sets
it to 0. Without that, as in the rest of the suite, the same code runs on the CPU, so that it is known to be right when
a GPU comes.
"""

from __future__ import annotations

import os
from typing import TypeVar

import pytest
import torch

REHEARSAL = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if REHEARSAL else "cuda")
ABSENT = not REHEARSAL and not torch.cuda.is_available()
gpu_only = pytest.mark.skipif(REHEARSAL, reason="nothing to rehearse without a GPU")

T = TypeVar("T")


def sized(real: T, rehearsed: T) -> T:
    """The size of a test on a GPU, and in the rehearsal."""
    return rehearsed if REHEARSAL else real

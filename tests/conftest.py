import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported, so before anything else

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported, so before anything else

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a hub id that is not there is an error at once, without retries

import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:  # as many processes as cores: more threads than one each would fight
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)

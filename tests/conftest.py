import os
import shutil
import tempfile

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported, so before anything else

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a hub id that is not there is an error at once, without retries

# What is read and encoded in tests is kept for this process alone; looked at when the libraries are imported.
os.environ["HF_ASSETS_CACHE"] = os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="esft-tests-")

import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:  # as many processes as cores: more threads than one each would fight
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_sessionfinish() -> None:
    shutil.rmtree(os.environ["HF_ASSETS_CACHE"], ignore_errors=True)

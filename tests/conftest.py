import importlib.util
import os
import shutil
import tempfile

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported, so before anything else

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a hub id that is not there is an error at once, without retries

# One thread: workers are as many as cores, and of several a forked child has none, and waits for them. The variable is
# for processes that tests start; libraries of this one may have been loaded before.
os.environ["OMP_NUM_THREADS"] = "1"

# What is read and encoded in tests is kept for this process alone; looked at when the libraries are imported.
os.environ["HF_ASSETS_CACHE"] = os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="esft-tests-")

import pytest
import torch

torch.set_num_threads(1)

if os.environ["TRITON_INTERPRET"] == "1" and importlib.util.find_spec("triton"):
    from tests import triton_interpreter

    triton_interpreter.speed_up()


# Beside the tests that are marked one by one: whole commands, several processes, all families, thousands of cases.
SLOW = tuple(
    f"tests/{place}"
    for place in (
        "benchmarks/", "examples/", "gpu/", "esft/parallel/", "esft/checkpoint/test_families_checkpoint.py",
        "esft/cli/test_job.py", "esft/cli/test_streams.py", "esft/planning/", "esft/reporting/test_run_page.py",
        "esft/swapping/test_load.py", "esft/swapping/test_save_", "esft/swapping/test_spread_model.py",
        "esft/training/test_compiled_layers.py", "esft/training/test_dealt_trainer.py",
        "esft/training/test_runs.py", "esft/training/test_several_processes.py", "esft/test_init.py",
        "esft/test_interop", "esft/test_readers.py", "esft_kernels/backends/test_cpu_memory.py",
        "esft_kernels/backends/test_triton_backend.py",
    )
)  # fmt: skip


# Some tests of these take minutes: they begin first, or one core would end with them alone.
LONGEST = ("tests/esft_kernels/test_fuzz.py", "tests/esft_kernels/test_compile.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not item.nodeid.startswith(LONGEST))
    for item in items:
        # In the interpreter a family's model takes a second; the kernels' own tests have every case.
        if item.nodeid.startswith(SLOW) or (item.nodeid.startswith("tests/esft/") and "-triton]" in item.nodeid):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_sessionfinish() -> None:
    shutil.rmtree(os.environ["HF_ASSETS_CACHE"], ignore_errors=True)

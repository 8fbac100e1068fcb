import gc
import os
import tempfile
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from tests.gpu.device import ABSENT, REHEARSAL

if not REHEARSAL:
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # there are as many processes as cores already
collect_ignore_glob = [] if find_spec("triton") else ["test_*.py"]
if ABSENT:  # passed over, they would look as if the kernels had been tested
    raise pytest.UsageError("TRITON_INTERPRET=0 asks for a GPU, and none is here")


@pytest.fixture(autouse=True)
def _synchronised():
    """A fault is reported by the test that made it, and no test leaves memory to the next."""
    if REHEARSAL:
        yield
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(1)  # an earlier fault has ended this process's use of the GPU; the others go on in a new one
        raise
    yield
    torch.cuda.synchronize()
    gc.collect()
    torch.cuda.empty_cache()


@pytest.fixture
def much_memory():
    """One such test at a time, of all processes: together they would not fit the GPU."""
    with FileLock(Path(tempfile.gettempdir()) / "esft-tests-much-memory.lock"):
        yield
        gc.collect()
        if not REHEARSAL:
            torch.cuda.empty_cache()

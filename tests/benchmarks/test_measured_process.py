import sys

import pytest

from benchmarks import measured_process
from benchmarks.measured_process import python, run

# The memory is given back before the end: what counts is the most.
GROW = (
    "import time; held = bytearray(300_000_000); print('one'); print('all of it', flush=True); time.sleep(0.3); "
    "del held; time.sleep(0.2)"
)


def test_seconds_memory_status_and_the_last_line_are_told():
    found = run(python("-c", GROW))
    assert found["status"] == 0 and found["said"] == "all of it"
    assert 0.3 <= found["anonymous_gb"] < 0.4 and found["anonymous_gb"] <= found["resident_gb"] + 0.01 < 0.45
    assert 0.3 < found["seconds"] < 30


def test_a_process_that_fails_is_told_with_what_it_said():
    found = run(python("-c", "import sys; print('it broke', file=sys.stderr); sys.exit(3)"))
    assert (found["status"], found["said"]) == (3, "it broke")


def test_a_process_is_held_to_its_limit():
    try:
        free = run(python("-c", GROW), memory_gb=1.0)
    except RuntimeError:
        pytest.skip("no control group can be made here")
    assert free["status"] == 0
    assert run(python("-c", GROW), memory_gb=0.1)["status"] == -9


def test_where_no_control_group_can_be_made_that_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(measured_process, "CGROUPS", tmp_path / "none")
    with pytest.raises(RuntimeError, match="--memory-gb needs a control group"):
        run([sys.executable, "-c", ""], memory_gb=1.0)

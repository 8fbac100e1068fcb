"""A command in a process of its own: how long it takes, and how much memory, held to a limit where so asked."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CGROUPS = Path("/sys/fs/cgroup")
EVERY = 0.05  # seconds between looks at the process


def run(command: Sequence[str], memory_gb: float | None = None) -> dict[str, Any]:
    """Seconds, exit status, the last line of the output, and the peak of memory in GB.

    ``anonymous`` is what the process has made; ``resident`` has the pages of files that it looks at as well, which the
    system takes back when it needs them.
    """
    begun, peak = time.monotonic(), 0
    with _limited(memory_gb) as enter, tempfile.TemporaryFile() as output:
        process, resident = subprocess.Popen(command, stdout=output, stderr=output, preexec_fn=enter), 0
        while process.poll() is None:
            anonymous, most = _memory(process.pid)
            peak, resident = max(peak, anonymous), max(resident, most)
            time.sleep(EVERY)
        output.seek(0)
        text = output.read().decode(errors="replace")
    lines = [line for line in text.replace("\r", "\n").splitlines() if line.strip()]
    return {
        "status": process.returncode,
        "seconds": time.monotonic() - begun,
        "anonymous_gb": peak / 1e9,
        "resident_gb": resident / 1e9,
        "said": lines[-1].strip() if lines else "",
    }


def _memory(pid: int) -> tuple[int, int]:
    """Bytes: anonymous now, and the largest resident so far."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:  # it has ended
        return 0, 0
    held = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith(" kB")}
    return held.get("RssAnon", 0), held.get("VmHWM", 0)


@contextmanager
def _limited(memory_gb: float | None) -> Iterator[Any]:
    """What a new process calls to be held to a limit, pages of files included; swapping is none of it.

    Raises RuntimeError where no control group can be made.
    """
    if memory_gb is None:
        yield None
        return
    for root, limit in ((CGROUPS, "memory.max"), (CGROUPS / "memory", "memory.limit_in_bytes")):
        group = root / f"esft-{os.getpid()}"
        try:
            group.mkdir()
            if (group / limit).exists():
                (group / limit).write_text(str(int(memory_gb * 1e9)))
                break
            group.rmdir()
        except OSError:
            continue
    else:
        raise RuntimeError("--memory-gb needs a control group (cgroup) for memory, and none can be made here")

    def enter() -> None:
        (group / "cgroup.procs").write_text(str(os.getpid()))

    try:
        yield enter
    finally:
        _remove(group)


def _remove(group: Path) -> None:
    for _ in range(100):
        try:
            return group.rmdir()
        except OSError:  # the last process is on its way out
            time.sleep(EVERY)
    return None


def python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]

"""Jobs of several processes for tests: forked, with what ``torchrun`` says in their environment."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from esft.errors import InputError
from esft.parallel import watch
from esft.parallel.ranks import Ranks
from tests.esft.processes import forked

LONGEST = 100  # seconds of a job


class FirstOfTwo(Ranks):
    """One of two processes that does what a single one does, without the other."""

    size = 2


def refused(call: Callable[[], object], kind: type[Exception] = InputError) -> str:
    """What a call says that is refused; "done" where it is not."""
    try:
        call()
    except kind as error:
        return str(error)
    return "done"


@dataclass(frozen=True)
class Ended:
    """A rank that has ended: its exit status, what it returned, and what it wrote to standard error."""

    status: int
    value: Any
    said: str


def job(folder: Path, size: int, work: Callable[[], Any], then: Callable[[list[int]], None] = lambda pids: None):
    """Run ``work``, which returns a JSON value, in so many ranks at once; ``then`` gets their process ids meanwhile.

    Returns how every rank ended, in their order.
    """
    port = free_port()
    pids = [forked(partial(_child, folder, rank, size, port, work)) for rank in range(size)]
    then(pids)
    statuses = _statuses(pids)
    return [
        Ended(status, json.loads(value.read_text()) if value.is_file() else None, (folder / f"{rank}.err").read_text())
        for rank, status in enumerate(statuses)
        for value in [folder / f"{rank}.json"]
    ]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def become_rank(rank: int, size: int, port: int) -> None:
    """Let this process be one of a job's, whose ranks find one another at this port."""
    os.environ |= {f"{of}RANK": str(rank) for of in ("", "LOCAL_")} | {
        f"{of}WORLD_SIZE": str(size) for of in ("", "LOCAL_")
    }
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)  # threads do not survive a fork
    watch.PULSE = 0.1


def _child(folder: Path, rank: int, size: int, port: int, work: Callable[[], Any]) -> None:
    become_rank(rank, size, port)
    (folder / f"{rank}.json").unlink(missing_ok=True)
    descriptor = os.open(folder / f"{rank}.err", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(descriptor, 2)
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115 (until the child ends)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        value = work()
    except SystemExit as error:
        os._exit(int(error.code or 0))
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    (folder / f"{rank}.json").write_text(json.dumps(value))


def _statuses(pids: list[int]) -> list[int]:
    """As ``waitstatus_to_exitcode`` has them; a job that hangs is killed."""
    left, statuses, until = set(pids), {}, time.monotonic() + LONGEST
    while left:
        for pid in list(left):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                left.remove(pid)
                statuses[pid] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > until:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            until += LONGEST
        time.sleep(0.02)
    return [statuses[pid] for pid in pids]

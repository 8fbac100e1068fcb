"""What becomes of a job of which a rank fails, dies or hangs: it ends, in one line that names the rank."""

import os
import signal
import time
from functools import partial

import pytest

from esft.errors import InputError
from esft.parallel import watch
from esft.parallel.join import joined
from tests.esft.parallel.jobs import job


def at_work(folder, one: str) -> None:
    """Sums without end; what rank 1 does instead after a while is its name."""
    watch.DEAD, watch.PATIENCE = 2.0, 3.0
    with joined() as ranks:
        for number in range(10**6):
            ranks.totals(1.0)
            if number == 3:
                (folder / f"{ranks.rank}.begun").touch()
            if number == 5 and ranks.rank == 1 and one == "sleep":
                time.sleep(60)
            if number == 5 and one == "fail" and ranks.rank:
                raise InputError("d.jsonl: line 3: is none")
            time.sleep(0.01)


@pytest.mark.parametrize(
    ("one", "line"),
    [
        ("fail", None),  # its own, which the command prints
        ("kill", r"esft: rank 1: has died (process {pid} is gone; killed, or out of memory?)"),
        ("stop", r"esft: rank 1: has died, or its machine: no sign of life from process {pid} on {host} for 2 s"),
        ("sleep", r"esft: rank 1: has hung: rank {waiting} waits for it at a sum"),
    ],
)
def test_a_rank_that_fails_ends_the_others_in_one_line(tmp_path, one: str, line: str | None):
    begun, found = time.monotonic(), {}

    def then(pids: list[int]) -> None:
        found["pid"] = pids[1]
        if one in ("kill", "stop"):
            while not (tmp_path / "1.begun").exists():
                time.sleep(0.01)
            os.kill(pids[1], signal.SIGKILL if one == "kill" else signal.SIGSTOP)
        if one == "stop":
            time.sleep(4)
            os.kill(pids[1], signal.SIGKILL)  # one that is stopped does not end by itself

    ended = job(tmp_path, 3, partial(at_work, tmp_path, one), then)
    assert time.monotonic() - begun < 20
    said = "".join(e.said for e in ended)
    if line is None:
        # The first of the two that failed raises its error; to the other and to rank 0 somebody else has failed.
        assert sorted(e.status for e in ended) == [1, 2, 2] and ended[0].status == 2
        assert said.count("InputError: d.jsonl: line 3: is none") == 1
    else:
        wanted = [line.format(pid=found["pid"], host=os.uname().nodename, waiting=waiting) + "\n" for waiting in (0, 2)]
        assert said in wanted
        assert [ended[0].status, ended[2].status] == [watch.STATUS] * 2

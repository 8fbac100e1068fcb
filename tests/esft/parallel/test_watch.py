"""What becomes of a job of which a rank fails, dies or hangs: it ends, in one line that names the rank."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from esft.errors import InputError, RankError
from esft.parallel import watch
from esft.parallel.join import joined
from esft.parallel.watch import Watch
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
            if number == 5 and one == "memory" and ranks.rank == 1:
                ranks.gather(torch.zeros(1, 1).expand(1 << 47, 1))
            time.sleep(0.01)


@pytest.mark.parametrize(
    ("one", "line"),
    [
        ("fail", None),  # its own, which the command prints
        ("memory", None),
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
    if one == "memory":  # in the middle of an operation that others wait at
        assert [e.status for e in ended] == [2, 1, 2]
        assert said.count("you tried to allocate 1688849860263936 bytes") == said.count("RuntimeError: ") == 1
    elif line is None:
        # The first of the two that failed raises its error; to the other and to rank 0 somebody else has failed.
        assert sorted(e.status for e in ended) == [1, 2, 2] and ended[0].status == 2
        assert said.count("InputError: d.jsonl: line 3: is none") == 1
    else:
        wanted = [line.format(pid=found["pid"], host=os.uname().nodename, waiting=waiting) + "\n" for waiting in (0, 2)]
        assert said in wanted
        assert [ended[0].status, ended[2].status] == [watch.STATUS] * 2


class Kept(dict):
    """A job's store in this process."""

    def clone(self):
        return self

    def set(self, key: str, value: str) -> None:
        self[key] = value

    def check(self, keys: list[str]) -> bool:
        return all(key in self for key in keys)

    def compare_set(self, key: str, expected: str, value: str) -> bytes:
        if self.get(key, "") == expected:
            self[key] = value
        return self[key].encode()


@pytest.fixture
def slept(monkeypatch):
    """What the main thread would have slept."""
    seconds = []
    clock = SimpleNamespace(sleep=seconds.append, monotonic=time.monotonic)
    monkeypatch.setattr(watch, "time", clock)
    monkeypatch.setattr(watch, "PULSE", 0.01)
    return seconds


def test_an_operation_that_fails_waits_for_who_says_why_unless_nobody_watches_any_more(slept):
    own = Watch(Kept(), 1, 2)
    for watched in (True, False):
        failed = pytest.raises(RankError, match="^no connection to the other ranks at a sum: reset by peer$")
        with failed, own.waiting("a sum"):
            raise RuntimeError("reset by peer")
        assert slept.pop() == pytest.approx(watch.DEAD + 0.04 if watched else 0.04) and not slept
        own.stop()
    with pytest.raises(torch.OutOfMemoryError), own.waiting("a sum"):
        raise torch.OutOfMemoryError("full")
    assert own.stopped and not slept


def test_a_process_that_is_gone_has_died_unless_it_is_of_another_place_or_has_left_in_peace(monkeypatch):
    monkeypatch.setattr(Watch, "_run", lambda self: None)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    store = Kept()
    own, beat = Watch(store, 0, 2), {"beat": 1, "entered": 1, "progress": 1, "pid": gone.pid}
    died = f"has died (process {gone.pid} is gone; killed, or out of memory?)"
    for place, said in (("another pid:[1]", None), (watch._place(), died)):
        store.set("beat/1", json.dumps(beat | {"place": place}))
        assert own._dead(1) == said
    store.set("left/1", "")
    assert own._dead(1) is None


def test_of_two_ranks_that_blame_the_same_one_the_first_alone_says_so(monkeypatch):
    monkeypatch.setattr(Watch, "_run", lambda self: None)
    store = Kept()
    assert [Watch(store, rank, 3)._blame(0) for rank in (1, 2)] == [True, False]


def test_a_store_that_does_not_answer_ends_its_ranks(slept, monkeypatch):
    class Gone(Kept):
        def set(self, key: str, value: str) -> None:
            raise RuntimeError("broken pipe")

    ended = []
    monkeypatch.setattr(Watch, "_end", lambda self, line: ended.append(line))
    own = Watch(Gone(), 1, 2)
    own._thread.join(10)
    own.stop()
    assert ended == ["rank 1: the job's store does not answer: rank 0, or what has started the job, is gone"]


@pytest.mark.parametrize(("rank", "seconds"), [(0, [0.03]), (1, [])])
def test_only_who_has_the_store_stays_a_moment_for_the_others_to_read(slept, monkeypatch, rank: int, seconds: list):
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    own = Watch(Kept(), rank, 2)
    own.stop()
    own._let_others_read()
    assert slept == pytest.approx(seconds)


def test_where_process_numbers_have_no_namespace_a_place_is_the_host(monkeypatch):
    def readlink(path: str) -> str:
        raise OSError(path)

    assert watch._place().startswith(f"{socket.gethostname()} pid:")
    monkeypatch.setattr(os, "readlink", readlink)
    assert watch._place() == socket.gethostname()

"""Joining a job, and leaving it."""

import logging
import os
import signal
import subprocess
import sys
import time
import warnings
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from esft.errors import InputError, Interrupted, RankError
from esft.parallel import join
from esft.parallel.join import current, job_of, joined
from esft.parallel.watch import PATIENCE, STATUS
from tests.esft.parallel.jobs import job


def unlike() -> None:
    if os.environ["RANK"] == "1":
        torch.__version__ = "0.1"
    with joined():
        pass


def test_ranks_of_other_versions_are_found_out_at_the_start(tmp_path):
    ended = job(tmp_path, 2, unlike)
    assert sorted(e.status for e in ended) == [1, 2]
    said = "".join(e.said for e in ended)
    assert said.count(f"rank 1 has other version of torch than rank 0: 0.1, not {torch.__version__}") == 1


def interrupted(resumable: bool) -> str:
    try:
        with joined() as ranks:
            if resumable or ranks.main:
                raise Interrupted("stopped", 15, resumable)
            ranks.totals(0.0)
    except Interrupted as error:
        return str(error)
    return "went on"


@pytest.mark.parametrize("resumable", [True, False])
def test_what_all_ranks_leave_for_is_no_failure_and_what_one_leaves_for_is(tmp_path, resumable: bool):
    first, second = job(tmp_path, 2, lambda: interrupted(resumable))
    assert (first.status, first.value, first.said) == (0, "stopped", "")
    expected = (0, "stopped", "") if resumable else (2, None, "")
    assert (second.status, second.value, second.said) == expected


def waits(folder: Path) -> None:
    signal.signal(signal.SIGTERM, lambda *_: None)
    (folder / os.environ["RANK"]).touch()
    if os.environ["RANK"] == "0":
        with joined():
            pass


def test_a_signal_ends_a_rank_that_waits_for_others_to_come(tmp_path):
    begun = time.monotonic()

    def then(pids: list[int]) -> None:
        while not (tmp_path / "0").exists():
            time.sleep(0.01)
        time.sleep(0.3)
        os.kill(pids[0], signal.SIGTERM)

    first, _ = job(tmp_path, 2, partial(waits, tmp_path), then)
    assert first.status == -signal.SIGTERM and time.monotonic() - begun < 20


def dies_leaving(when: str) -> str:
    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with joined() as ranks:
        if not ranks.main and when == "before":
            ranks.meet = die
        elif not ranks.main:
            join.dist.barrier = die
    return "left"


def test_a_rank_that_dies_leaving_is_named_unless_all_have_done_their_part(tmp_path):
    first, _ = job(tmp_path, 2, partial(dies_leaving, "before"))
    assert (first.status, first.value) == (STATUS, None)
    assert first.said.startswith("esft: rank 1: has died (process ") and first.said.count("\n") == 1
    first, second = job(tmp_path, 2, partial(dies_leaving, "after"))
    assert (first.status, first.value, first.said) == (0, "left", "")
    assert second.status == -signal.SIGKILL


def again() -> list:
    found = []
    for turn in range(3):
        with joined() as ranks:
            if ranks.main:
                time.sleep(0.1)
            ranks.wait()
            found.append(ranks.gathered([turn, ranks.rank]))
    return found


def test_a_job_can_be_joined_again(tmp_path):
    ended = job(tmp_path, 2, again)
    assert [(e.status, e.value) for e in ended] == [(0, [[[turn, 0], [turn, 1]] for turn in range(3)])] * 2, ended


def test_it_may_be_what_a_process_imports_first():
    subprocess.run([sys.executable, "-c", "from esft.parallel.join import joined"], check=True)


def test_a_process_of_its_own_joins_nothing(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined() as ranks:
        assert ranks is current() and ranks.size == 1
        with pytest.raises(InputError, match="as it is"), joined():
            raise InputError("as it is")


def said() -> list:
    """How many warnings this rank shows of one, and whether it logs any."""
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        with joined():
            warnings.warn("once", stacklevel=1)
            logs = logging.getLogger("esft").isEnabledFor(logging.WARNING)
    return [len(shown), logs]


def test_what_every_rank_would_say_the_first_one_says(tmp_path):
    assert [e.value for e in job(tmp_path, 2, said)] == [[1, True], [0, False]]


def test_on_gpus_ranks_talk_through_both_memories_and_wait_longer_than_they_are_watched(monkeypatch):
    taken = []

    def begin(backend: str, timeout: timedelta, **_) -> None:
        taken.append((backend, timeout > timedelta(seconds=PATIENCE)))
        raise RuntimeError("enough seen")

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(join, "_store", torch.distributed.HashStore)
    watch = SimpleNamespace(stopped=False, failed=lambda: True, waiting=lambda _: nullcontext())
    monkeypatch.setattr(join, "Watch", lambda *_: watch)
    monkeypatch.setattr(join, "_take_gpu", lambda: None)
    monkeypatch.setattr(torch.distributed, "init_process_group", begin)
    for gpu, backend in ((True, "cpu:gloo,cuda:nccl"), (False, "gloo")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        with pytest.raises(RuntimeError, match="^enough seen$"), joined():
            pass
        assert taken.pop() == (backend, True)


def test_a_job_that_does_not_come_together_is_an_error(monkeypatch):
    waited = []

    def meet(url: str, timeout: timedelta):
        waited.append(timeout.total_seconds())
        raise ValueError("no address")

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(join, "rendezvous", meet)
    with pytest.raises(RankError, match=r"^cannot join the job \(no address\)$"):
        join._store()
    assert waited == [PATIENCE]


def test_a_package_that_is_not_installed_has_no_version_to_tell(monkeypatch):
    def version(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(join, "version", version)
    found = join._versions()
    assert (found["version of esft"], found["version of torch"]) == ("unknown", torch.__version__)


def test_every_process_gets_a_gpu_of_its_own_or_is_refused(monkeypatch):
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    join._take_gpu()
    assert taken == [1]
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(InputError, match="has no GPU: this machine has 2"):
        join._take_gpu()


def test_weights_that_are_spread_over_several_processes_are_out_of_reach_of_one():
    assert job_of(1) is current()
    with pytest.raises(RankError, match="^the weights are spread over 3 processes, and this is a job of 1$"):
        job_of(3)

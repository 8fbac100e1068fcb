"""Joining a job, and leaving it."""

import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from esft.errors import InputError, Interrupted
from esft.parallel import join
from esft.parallel.join import current, joined
from esft.parallel.watch import STATUS
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


def test_a_process_of_its_own_joins_nothing(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined() as ranks:
        assert ranks is current() and ranks.size == 1
        with pytest.raises(InputError, match="as it is"), joined():
            raise InputError("as it is")


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

"""Joining a job, and leaving it."""

import os
import subprocess
import sys
import time

import pytest
import torch

from esft.errors import InputError, Interrupted
from esft.parallel import join
from esft.parallel.join import current, joined
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

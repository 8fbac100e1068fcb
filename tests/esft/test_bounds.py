import os
import signal
import sys
import threading
import time
from contextlib import suppress
from types import SimpleNamespace

import pytest

import esft
from esft import bounds
from esft.bounds import memory_within, within


def endless() -> None:
    while True:
        pass


def test_a_block_that_takes_too_long_is_broken_off_though_it_catches_every_exception():
    with pytest.raises(esft.InputError, match=r"^it takes longer than 0\.01 seconds$"), within(0.01):
        while True:
            with suppress(Exception):
                endless()
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_a_callers_own_alarm_comes_after_the_block():
    came = []
    before = signal.signal(signal.SIGALRM, lambda *_: came.append(True))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with within(30):
            assert signal.getitimer(signal.ITIMER_REAL)[0] > 20
        until = time.monotonic() + 5
        while not came and time.monotonic() < until:
            pass
        assert came
    finally:
        signal.signal(signal.SIGALRM, before)


def test_a_thread_that_gets_no_signals_takes_its_time():
    def run() -> None:
        with within(0.001):
            threading.Event().wait(0.02)
        found.append(True)

    found = []
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [True]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says what a process has")
def test_a_block_gets_so_much_memory_and_no_more():
    import resource

    before = resource.getrlimit(resource.RLIMIT_DATA)
    with memory_within(1 << 28):
        assert len(bytearray(1 << 27)) == 1 << 27
        with pytest.raises(MemoryError):
            bytearray(1 << 30)
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
    assert len(bytearray(1 << 30)) == 1 << 30


@pytest.fixture
def limits(monkeypatch, tmp_path):
    """A process that has 7 pages of data and no limits; what limits were set, in order."""
    now, lacks = [(-1, -1)], SimpleNamespace(RLIMIT_DATA=2, RLIM_INFINITY=-1, getrlimit=lambda which: now[-1])
    lacks.setrlimit = lambda which, limit: now.append(limit)
    monkeypatch.setattr(bounds, "resource", lacks)
    (tmp_path / "statm").write_text("900 800 700 600 500 7 400\n")
    monkeypatch.setattr(bounds, "_USED", tmp_path / "statm")
    return now


def test_the_limit_is_what_the_process_has_and_so_much_more(limits):
    data = 7 * os.sysconf("SC_PAGE_SIZE")
    with memory_within(1000):
        assert limits == [(-1, -1), (data + 1000, -1)]  # the hard limit stays: what it was cannot be had again
    assert limits[-1] == (-1, -1)


@pytest.mark.parametrize("lower", [(5000, -1), (5000, 6000), (-1, 5000)], ids=str)
def test_a_limit_that_is_lower_already_stays(lower, limits):
    limits[:] = [lower]
    with memory_within(1000):
        assert limits[-1] == (5000, lower[1])
    assert limits[-1] == lower


def test_a_system_that_does_not_say_what_a_process_has_sets_no_limit(limits, monkeypatch):
    bounds._USED.unlink()
    with memory_within(0):
        pass
    assert limits == [(-1, -1)]
    monkeypatch.setattr(bounds, "resource", None)  # Windows
    bounds._USED.write_text("0 0 0 0 0 7 0")
    with memory_within(0):
        assert len(bytearray(1 << 20)) == 1 << 20


def test_a_callers_own_timer_keeps_its_interval():
    before = signal.signal(signal.SIGALRM, lambda *_: None)
    try:
        signal.setitimer(signal.ITIMER_REAL, 50, 60)
        with within(30):
            pass
        left, interval = signal.setitimer(signal.ITIMER_REAL, 0)
        assert 40 < left <= 50 and interval == 60
    finally:
        signal.signal(signal.SIGALRM, before)

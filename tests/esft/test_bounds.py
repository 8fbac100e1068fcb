import signal
import sys
import threading
from contextlib import suppress

import pytest

import esft
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
        while not came:
            pass
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

import os
import signal
import threading

import pytest

from esft.signals import SIGNALS, stop_signals
from tests.esft.processes import forked, status


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_is_only_noted_and_the_handlers_of_before_come_back(number: int):
    before = [signal.getsignal(each) for each in SIGNALS]
    with stop_signals() as asked:
        assert asked() is None
        os.kill(os.getpid(), number)
        assert asked() == number
    assert [signal.getsignal(each) for each in SIGNALS] == before
    with pytest.raises(KeyError), stop_signals():
        raise KeyError
    assert [signal.getsignal(each) for each in SIGNALS] == before


@pytest.mark.parametrize(
    ("numbers", "ends"),
    [((2,), 0), ((15,), 0), ((2, 2), 130), ((15, 15), 143), ((2, 15), 143), ((15, 2), 130)],
)
def test_the_second_signal_ends_the_process_at_once(numbers: tuple[int, ...], ends: int):
    def told() -> None:
        with stop_signals():
            for number in numbers:
                os.kill(os.getpid(), number)

    assert status(forked(told)) == ends


def test_a_thread_that_gets_no_signals_is_never_asked():
    found = []

    def run() -> None:
        with stop_signals() as asked:
            found.append(asked())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [None]

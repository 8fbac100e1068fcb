"""A job's ranks watch one another: one that fails, dies or hangs ends all of them, and is named in one line.

Every rank has a thread that writes a sign of life into the job's key-value store and reads there whether some rank was
found to have failed. The first rank watches all the others, these watch the first one.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil
import torch
from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage] (documented)

from esft.errors import RankError, asked_for, first_line
from esft.parallel.environment import hosts_store

PULSE = 0.5  # seconds between signs of life
DEAD = 60.0  # seconds without one; a process of the same machine that has ended is noticed at once
PATIENCE = 600.0  # seconds that others wait for a rank which makes no progress
STATUS = 2  # of a process that ends because another rank failed
_VERDICT, _LEFT = "verdict", "left"


class Watch:
    """One rank's part in the watching.

    Args:
        store: of the job; a connection of its own is made to it.
        rank, size: this rank, and how many there are.
    """

    def __init__(self, store: Store, rank: int, size: int):
        self.store, self.rank, self.size = store.clone(), rank, size
        self._entered, self._beat, self._progress = 0, 0, 0
        self._waits: tuple[int, str, float] | None = None  # at which collective operation, for what, since when
        self._seen: dict[int, tuple[int, float]] = {}  # rank -> its last beat, and when it was new
        self._moved: dict[int, tuple[int, float]] = {}  # the same of its progress
        self._stopped = threading.Event()
        self._place = _place()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def stopped(self) -> bool:
        return self._stopped.is_set()

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Around a collective operation, which waits for all ranks. Raises RankError where it fails."""
        self._entered += 1
        self._progress += 1
        self._waits = self._entered, what, time.monotonic()
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if asked_for(error) is not None:  # the CPU's memory has run out
                raise
            # Most likely because a rank has ended: who it was shows soon, and ends this process, too.
            time.sleep(4 * PULSE if self.stopped else DEAD + 4 * PULSE)
            raise RankError(f"no connection to the other ranks at {what}: {first_line(error)}") from error
        finally:
            self._waits = None

    def progress(self) -> None:
        """Note that the main thread has done something."""
        self._progress += 1

    def failed(self) -> bool:
        """Tell the others that this rank ends. False where another rank has failed before."""
        self.stop()
        with suppress(RuntimeError):  # no store any more: somebody else has ended first
            if self._blame(self.rank):
                self._let_others_read()
                return True
        with suppress(KeyboardInterrupt):
            time.sleep(2 * PULSE)  # who says why comes to it before torchrun ends all for this one's end
        return False

    def stop(self) -> None:
        """Neither watch nor be watched any more."""
        if not self.stopped:
            self._stopped.set()
            self._thread.join()
            with suppress(RuntimeError):
                self.store.set(f"{_LEFT}/{self.rank}", "")

    def _run(self) -> None:
        try:
            while not self.stopped:
                self._pulse()
                self._stopped.wait(PULSE)
        except RuntimeError:
            if not self.stopped:
                self._end(
                    f"rank {self.rank}: the job's store does not answer: rank 0, or what has started the job, is gone"
                )

    def _pulse(self) -> None:
        self._beat += 1
        beat = {
            "beat": self._beat,
            "entered": self._entered,
            "progress": self._progress,
            "pid": os.getpid(),
            "place": self._place,
        }
        self.store.set(f"beat/{self.rank}", json.dumps(beat))
        if self.store.check([_VERDICT]):
            self._end(None)
        for rank in range(1, self.size) if self.rank == 0 else (0,):
            if reason := self._dead(rank):
                self._sentence(rank, reason)
        if (waits := self._waits) is not None and time.monotonic() - waits[2] > PATIENCE / 2:
            for rank in set(range(self.size)) - {self.rank}:
                if self._hangs(rank, *waits):
                    self._sentence(rank, f"has hung: rank {self.rank} waits for it at {waits[1]}")

    def _sentence(self, rank: int, reason: str) -> None:
        first = self._blame(rank)
        self._end(f"rank {rank}: {reason}" if first else None)

    def _hangs(self, rank: int, entered: int, what: str, since: float) -> bool:
        """Whether a rank that has not come to an operation shows no progress any more."""
        beat, now = self._read(rank), time.monotonic()
        if beat is not None and beat["entered"] >= entered:
            return False
        progress = 0 if beat is None else beat["progress"]
        if self._moved.get(rank, (-1, 0.0))[0] != progress:
            self._moved[rank] = progress, now
        return now - since > PATIENCE and now - self._moved[rank][1] > PATIENCE / 2

    def _dead(self, rank: int) -> str | None:
        """How it shows that a rank is no more; None where it lives, or has left in peace."""
        beat, now = self._read(rank), time.monotonic()
        number = 0 if beat is None else beat["beat"]
        if self._seen.get(rank, (-1, 0.0))[0] != number:
            self._seen[rank] = number, now
        gone = beat is not None and beat["place"] == self._place and not _lives(beat["pid"])
        if not gone and now - self._seen[rank][1] <= DEAD:
            return None
        if self.store.check([f"{_LEFT}/{rank}"]):
            return None
        if gone and beat is not None:
            return f"has died (process {beat['pid']} is gone; killed, or out of memory?)"
        where = "" if beat is None else f" from process {beat['pid']} on {beat['place'].partition(' ')[0]}"
        return f"has died, or its machine: no sign of life{where} for {DEAD:.0f} s"

    def _read(self, rank: int) -> dict | None:
        key = f"beat/{rank}"
        return json.loads(self.store.get(key)) if self.store.check([key]) else None

    def _end(self, line: str | None) -> None:
        """End this process, whose main thread may wait for a rank that never comes."""
        if line is not None:
            print(f"esft: {line}", file=sys.stderr, flush=True)
        else:
            time.sleep(2 * PULSE)  # as in ``failed``
        self._let_others_read()
        os._exit(STATUS)

    def _let_others_read(self) -> None:
        if hosts_store():  # which ends with this process
            time.sleep(3 * PULSE)

    def _blame(self, rank: int) -> bool:
        """Whether this is the job's first failure."""
        mine = json.dumps([self.rank, rank])
        return self.store.compare_set(_VERDICT, "", mine).decode() == mine


def _place() -> str:
    """The host, and where it is told the namespace of process numbers: of containers each may have its own."""
    with suppress(OSError):
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()


def _lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False

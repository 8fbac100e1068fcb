"""Work that is killed: in child processes, before any of its file operations or at any time, and what is left of it.

``python -m tests.esft.chaos --kills 200`` (``make chaos``) kills trainings, savings and merges at random times: of one
process, of two that do the same at once, and of two that share a training. Whatever has come before, work that is not
killed has to end with the unbroken bytes.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Collection
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tqdm
import tqdm.auto

import esft
from esft.checkpoint.load import load_model
from esft.errors import ESFTError
from tests.esft.parallel.jobs import become_rank, free_port
from tests.esft.processes import forked, status
from tests.esft.small_runs import SELECTION, base_and_data, settings

LONGEST = 120  # seconds of a child: one that hangs says where
GRACE = 30  # seconds in which a rank ends that was left alone; then it is killed, as torchrun does
TRAININGS = ("train", "resume", "overwrite")
NAMED, TRACEBACK, KILLED = 2, 1, -signal.SIGKILL  # how a child may end, but for 0
WRITES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "open"}  # audit events of file operations
RATES = {"a": 3e-3, "b": 1e-3}  # a run of the one never has the bytes of the other
CONFIGS = {
    name: settings(lr=lr, steps=4, save_every=1, eval_every=2, dtype="float32")
    for name, lr in (("a", 3e-3), ("b", 1e-3))
}


class Place:
    """A folder with a base, data, an adapter and files of a user's own, beside which work is done and killed."""

    def __init__(self, folder: Path):
        self.folder = folder
        base_and_data(folder)
        for name in (".run.tmp", ".run.old", ".merged.tmp", "thesis"):
            (folder / name).mkdir()
            (folder / name / "chapter.tex").write_text("years of work")
        self.whole: dict[str, Any] = {}
        for name in CONFIGS:
            assert self.wait(self.start(partial(self.train, name, out=f"whole-{name}"))) == 0, self.said
            self.whole[name] = outcome(folder / f"whole-{name}")
        shutil.copytree(folder / "whole-a" / "adapter", folder / "adapter")
        for work in (self.merge, self.save):
            assert self.wait(self.start(partial(work, overwrite=False))) == 0, self.said
            self.whole[work.__name__] = contents(folder / work.__name__)
        self.foreign = self.untouched()

    def train(self, config: str | None, resume: bool = False, overwrite: bool = False, out: str = "run") -> None:
        """Begin a run with one of ``CONFIGS``, or replace one; go on with one where that is None."""
        data = self.folder / "d.jsonl"
        chosen, selection = (CONFIGS[config], SELECTION) if config else (None, None)
        esft.train(
            str(self.folder / "base"),
            data,
            self.folder / out,
            chosen,
            selection,
            data,
            resume,
            overwrite,
            progress=False,
        )

    def merge(self, overwrite: bool = True) -> None:
        esft.merge(self.folder / "base", self.folder / "adapter", self.folder / "merge", overwrite)

    def save(self, overwrite: bool = True) -> None:
        model = esft.load_adapter(esft.swap(load_model(str(self.folder / "base")), SELECTION), self.folder / "adapter")
        esft.save_adapter(model, self.folder / "save", overwrite)

    @property
    def said(self) -> str:
        """What the last child said that ended with an error."""
        return (self.folder / "said").read_text()

    def start(self, work: Callable[[], None], before: int | None = None) -> int:
        """Do work in a child, which is killed before that file operation of its, counted from 1. Returns its id."""

        def child() -> None:
            torch.set_num_threads(1)  # threads do not survive a fork
            faulthandler.dump_traceback_later(LONGEST, exit=True, file=open(self.folder / "said", "w"))  # noqa: SIM115
            for bar in (tqdm.tqdm, tqdm.auto.tqdm):
                bar.set_lock(threading.RLock())  # instead of one of all processes, which a killed one never gives back
            warnings.simplefilter("ignore")
            sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (bars of other libraries)
            if before is not None:
                kill_before(before, str(self.folder))
            try:
                work()
            except ESFTError as error:
                (self.folder / "said").write_text(str(error))
                os._exit(NAMED)
            except SystemExit as error:  # of a rank that another one has ended
                os._exit(error.code if isinstance(error.code, int) else TRACEBACK)
            except BaseException:
                (self.folder / "said").write_text(traceback.format_exc())
                os._exit(TRACEBACK)

        return forked(child)

    def start_ranks(self, work: Callable[[], None]) -> list[int]:
        """Do work in two ranks of a job. Returns their ids."""
        port = free_port()

        def as_rank(rank: int) -> None:
            become_rank(rank, 2, port)
            work()

        return [self.start(partial(as_rank, rank)) for rank in range(2)]

    def wait(self, pid: int) -> int:
        ended = status(pid)
        assert ended in (0, NAMED, KILLED), self.said
        assert ended != NAMED or self.said.count("\n") == 0, self.said
        return ended

    def untouched(self) -> dict[str, bytes]:
        """What no work may change."""
        ours = ("run", "job", "merge", "save", ".merge.esft", ".save.esft", "said")
        return {name: data for name, data in contents(self.folder).items() if name.split("/")[0] not in ours}

    def check_foreign(self) -> None:
        assert self.untouched() == self.foreign

    def check_run(self, out: str = "run", beside: Collection[str] = ()) -> None:
        """That the run, which has ended, is the unbroken one of its settings; files beside it are a user's."""
        found = outcome(self.folder / out)
        found["left"] = [name for name in found["left"] if name not in beside]
        assert found in [self.whole[name if out == "run" else f"{out} {name}"] for name in CONFIGS]


def kill_before(number: int, below: str) -> None:
    """Let this process be killed before its file operation of that number, of those that write below a folder."""
    left = number

    def count(event: str, args: tuple) -> None:
        nonlocal left
        if event in WRITES and str(args[0]).startswith(below):
            writes = event != "open" or (args[2] or 0) & (os.O_WRONLY | os.O_RDWR)
            left -= bool(writes)
            if writes and not left:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def outcome(run: Path) -> dict[str, Any]:
    """All of a run that is the same whenever it is done again."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    summary = json.loads((run / "summary.json").read_text())
    files = [*(run / "adapter").iterdir(), *(run / "checkpoints" / "step-000003").iterdir()]
    files += [run / name for name in ("config.yaml", "experts.json", "origin.json", "esft_run.json")]
    return {
        "files": {str(path.relative_to(run)): path.read_bytes() for path in files},
        "metrics": [{name: v for name, v in line.items() if name != "tokens_per_second"} for line in lines],
        "summary": {name: summary[name] for name in ("steps", "train_loss", "eval_loss", "stored_bytes")},
        "left": sorted(path.name for path in run.iterdir()),
    }


def end(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def kill(place: Place, draw: random.Random, lasts: dict[str, float]) -> str:
    """One or two processes at the same work, or a job's two ranks, killed at a random time. Returns what was done."""
    works: dict[str, Callable[[], None]] = {
        "train": partial(place.train, draw.choice("ab")),
        "resume": partial(place.train, None, resume=True),
        "overwrite": partial(place.train, draw.choice("ab"), overwrite=True),
        "merge": place.merge,
        "save": place.save,
    }
    name = draw.choices([*works], [1, 3, 2, 1, 1])[0]
    by = draw.choice(("1", "2", "ranks")) if name in TRAININGS else draw.choice("12")
    if by == "ranks":
        pids = place.start_ranks(partial(works[name], out="job"))
        killed, lasting = draw.choice((pids, pids[:1], pids[1:])), lasts["job"]
    else:
        killed = pids = [place.start(works[name]) for _ in range(int(by))]
        lasting = lasts["train" if name in TRAININGS else name]
    time.sleep(draw.uniform(0, lasting))
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    left = [threading.Timer(GRACE, end, (pid,)) for pid in pids if pid not in killed]
    for timer in left:
        timer.start()
    ended = [place.wait(pid) for pid in pids]
    for timer in left:
        timer.cancel()
    place.check_foreign()
    return f"{name} by {by}: " + ("killed" if KILLED in ended else "had ended")


def mend(place: Place) -> None:
    """What a user does next: go on, or begin where nothing has begun. All of it has to end with the unbroken bytes."""
    for out, start in (("run", lambda work: [place.start(work)]), ("job", place.start_ranks)):
        train = partial(place.train, out=out)
        if any(list(map(place.wait, start(partial(train, None, resume=True))))):
            assert "holds no run to resume" in place.said, place.said
            assert not any(list(map(place.wait, start(partial(train, "a"))))), place.said
        place.check_run(out)
    for work in (place.merge, place.save):
        assert place.wait(place.start(work)) == 0, place.said
        assert contents(place.folder / work.__name__) == place.whole[work.__name__]
    place.check_foreign()
    assert not [name for name in contents(place.folder) if ".esft" in name], "something is left of a kill"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    draw, done, begun = random.Random(args.seed), Counter(), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        place, lasts = Place(Path(folder)), {}
        for name, work in (("train", partial(place.train, "a")), ("merge", place.merge), ("save", place.save)):
            started = time.monotonic()
            assert place.wait(place.start(work)) == 0, place.said
            lasts[name] = 1.1 * (time.monotonic() - started)
        for name in "ba":  # of ranks, whose sums are rounded elsewhere than those of one process
            started = time.monotonic()
            pids = place.start_ranks(partial(place.train, name, overwrite=True, out="job"))
            assert [place.wait(pid) for pid in pids] == [0, 0], place.said
            lasts["job"] = 1.1 * (time.monotonic() - started)
            place.whole[f"job {name}"] = outcome(place.folder / "job")
        kills = 0
        while kills < args.kills:
            for out in ("run", "job"):
                if draw.random() < 0.2:
                    shutil.rmtree(place.folder / out, ignore_errors=True)
            for _ in range(draw.randint(1, 4)):  # one after the other, before anything is mended
                what = kill(place, draw, lasts)
                done[what] += 1
                kills += what.endswith("killed")
            mend(place)
    for what, count in sorted(done.items()):
        print(f"{count:4} {what}")
    print(f"{kills} kills in {time.monotonic() - begun:.0f} s: always the unbroken bytes, no file of others changed")


if __name__ == "__main__":
    main()

"""A run's folder to train in: by one process at a time, and in the place of an earlier run only when it is whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from esft.errors import InputError
from esft.runs.run_folder import LOCK, NEXT, ORIGIN, REPLACED, SUMMARY, RunFolder
from esft.storage.outputs import RUN_MARKER, check_new_folder, disk_errors, entries, resolved

_DONE = "overwriting-done"  # in the run's folder: what was ``NEXT``, from when all of the earlier run is put aside


@contextmanager
def opened(out: str | Path, resume: bool, overwrite: bool) -> Iterator[RunFolder]:
    """The folder to begin a run in, or to go on with one, locked for the block.

    A run that replaces another is made in ``out/overwriting``, and takes the other's place at the end of the block. If
    it does not get there, the other one stays as it is, and ``resume`` goes on with the one that has been begun last:
    one that was broken off in that folder stays, too, until it is ``cleared``.

    Raises InputError where there is no run to go on with or to replace, where files are there that no run has written,
    and where another process holds the run; DiskError for a disk that is full or fails in the block.
    """
    if resume and overwrite:
        raise InputError("`resume=True` and `overwrite=True` exclude each other")
    run = RunFolder(resolved(out))
    with disk_errors(run.path):  # of files that go while they are looked at, too
        check_new_folder(out, lambda path: list(entries(path)))
        for path in (run.path / NEXT, run.path / _DONE, run.path / NEXT / REPLACED, run.path / _DONE / REPLACED):
            if path.is_symlink() or (path.exists() and not path.is_dir()):
                raise InputError(f"{path}: is no folder, where a run has one of its own; move it elsewhere")
        if not _is_run(run):  # in what is not ours not even a lock is made
            _place(run, resume, overwrite)
        with run.lock():
            run.recover()
            _replace(run)
            folder = _place(run, resume, overwrite)
            following = RunFolder(run.path / NEXT)
            if following.broken_off:
                shutil.rmtree(following.path, ignore_errors=True)
            yield folder
            _replace(run)


def latest(out: str | Path) -> RunFolder:
    """The run in a folder that has been begun last: one that is to replace the other, or the only one."""
    following = RunFolder(Path(out) / NEXT)
    return following if following.begun else RunFolder(out)


def cleared(run: RunFolder) -> RunFolder:
    """A run's folder to begin anew in: of one that was broken off while it was to replace another nothing is left.

    A run in its own place finds none. Raises InputError where files are there by now that no run has written.
    """
    if run.path.name == NEXT and run.path.is_dir():
        run.check_ours(REPLACED)
        (run.path / ORIGIN).unlink(missing_ok=True)  # the first, as without it no run has begun
        for path in list(run.path.iterdir()):
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != LOCK:
                path.unlink()
    return run


def _is_run(run: RunFolder) -> bool:
    parts = (run, RunFolder(run.path / NEXT), RunFolder(run.path / _DONE))
    return run.broken_off or any(part.begun or part.holds(RUN_MARKER) for part in parts)


def _place(run: RunFolder, resume: bool, overwrite: bool) -> RunFolder:
    """Where to train. Raises InputError as ``opened`` does."""
    following = RunFolder(run.path / NEXT)
    if resume:
        folder = latest(run.path)
        if not folder.begun:
            raise InputError(f"{run.path}: holds no run to resume{run.why_not_begun}")
        folder.recover()
        folder.check_outcome()
        return folder
    if run.broken_off:
        return run
    if not overwrite:
        raise InputError(
            f"{run.path}: holds something already (`overwrite=True` replaces it, `resume=True` goes on with it)"
        )
    if not run.holds(RUN_MARKER):
        hint = "; it may be a run of an earlier version: `resume=True` first" if run.begun else ""
        raise InputError(f"{run.path}: holds no run (no {RUN_MARKER}), and is not overwritten{hint}")
    if following.path.is_dir():
        following.recover()
    run.check_ours()
    return following


def _replace(run: RunFolder) -> None:
    """Put a following run that is whole in the place of the earlier one; a kill at any point is made good the next
    time."""
    following, done = RunFolder(run.path / NEXT), run.path / _DONE
    if following.holds(SUMMARY):
        try:
            run.check_ours()
        except InputError as error:
            raise InputError(f"{error}, and `resume=True`: the new run is whole, in {following.path}") from error
        replaced = following.path / REPLACED
        replaced.mkdir(exist_ok=True)
        for path in sorted(run.path.iterdir()):
            if path.name not in (LOCK, NEXT):
                os.replace(path, replaced / path.name)
        os.replace(following.path, done)
    if done.is_dir():
        RunFolder(done).check_ours(REPLACED)
        # The marker last: it says what is of the run.
        for path in sorted(done.iterdir(), key=lambda path: (path.name == RUN_MARKER, path.name)):
            if path.name != REPLACED:
                os.replace(path, run.path / path.name)
        shutil.rmtree(done)

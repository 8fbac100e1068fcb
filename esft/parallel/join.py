"""Joining a job of several processes, as ``torchrun`` starts it: what it says of them is in the environment."""

from __future__ import annotations

import logging
import platform
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from itertools import count

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store  # pyright: ignore[reportPrivateImportUsage] (documented)
from torch.distributed.rendezvous import rendezvous

from esft.errors import InputError, Interrupted, RankError, first_line
from esft.parallel.environment import attempt, local_rank, own_rank, size_of_job
from esft.parallel.ranks import ALONE, Group, Ranks
from esft.parallel.watch import PATIENCE, STATUS, Watch
from esft.transformers_internals import disable_progress_bar

_SLACK = 120  # seconds that PyTorch waits longer than we do, who say for whom
_PACKAGES = ("esft", "torch", "transformers", "safetensors")
_times = count()  # that this process has joined a job
_joined: list[Ranks] = []  # the job that this process is in, the innermost last


def current() -> Ranks:
    """The job that this process has joined; one process where it has joined none."""
    return _joined[-1] if _joined else ALONE


def job_of(size: int) -> Ranks:
    """The job over which weights are spread. Raises RankError for a process that is in one of another size."""
    if current().size != size:
        raise RankError(f"the weights are spread over {size} processes, and this is a job of {current().size}")
    return current()


@contextmanager
def joined() -> Iterator[Ranks]:
    """The ranks of the job that this process is one of, for the block; inside it, those that are joined already.

    On a machine with GPUs every process gets one of its own. A rank that leaves the block with an error ends the
    others; it is the only one that raises it, and where several fail, the first.

    Raises InputError for more processes than GPUs, RankError where ranks have other versions of what computes.
    """
    if _joined or size_of_job() == 1:
        yield current()
        return
    rank, size = own_rank(), size_of_job()
    store = _store()
    watch = Watch(store, rank, size)
    try:
        _take_gpu()
        with watch.waiting("the start"):
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
                store=PrefixStore("group", store),
                rank=rank,
                world_size=size,
                timeout=timedelta(seconds=PATIENCE + _SLACK),
            )
        ranks = Group(store, watch)
        if not ranks.main:
            _hush()
        ranks.check_alike(_versions())
        _joined.append(ranks)
        try:
            yield ranks
        except Interrupted as error:
            if not error.resumable:
                raise
            _leave(ranks)  # as all ranks do
            raise
        _leave(ranks)
    except BaseException:
        if not watch.stopped and not watch.failed():
            raise SystemExit(STATUS) from None
        raise
    finally:
        _joined.clear()


def _leave(ranks: Group) -> None:
    """End the job with all ranks; the first one, which may hold the store, after nobody needs it any more."""
    ranks.meet()
    ranks.watch.stop()
    with suppress(RuntimeError):  # of a rank that dies now nothing is missing
        dist.barrier()
    dist.destroy_process_group()


def _store() -> Store:
    """The job's key-value store, a new part of it: for every attempt of ``torchrun``, and every time that all join."""
    patience = timedelta(seconds=PATIENCE)
    try:
        with _ended_by_signals():
            store, _, _ = next(rendezvous("env://", timeout=patience))
    except (ValueError, RuntimeError) as error:
        raise RankError(f"cannot join the job ({first_line(error)})") from error
    return PrefixStore(f"esft/{attempt()}/{next(_times)}", store)


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """For a wait in C++, in which no handler of Python's runs: SIGINT and SIGTERM end the process at once.

    It has begun nothing. Threads but the main one, which cannot say so, leave it as it is.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)  # None: not set from Python


def _take_gpu() -> None:
    """Let this process compute on the GPU of its number among those of its machine."""
    if not torch.cuda.is_available():
        return
    local, count = local_rank(), torch.cuda.device_count()
    if local >= count:
        raise InputError(f"has no GPU: this machine has {count}, and more processes (CUDA_VISIBLE_DEVICES= hides all)")
    torch.cuda.set_device(local)


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # run from its folder
            found[name] = "unknown"
    found["torch"] = torch.__version__  # with what it was built for
    return {f"version of {name}": text for name, text in (found | {"Python": platform.python_version()}).items()}


def _hush() -> None:
    """What every rank would say, the first one says."""
    disable_progress_bar()
    logging.getLogger("esft").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")

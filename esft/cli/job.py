"""A command of several processes, as ``torchrun`` starts them."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from esft.parallel.environment import own_rank, size_of_job

SHARED = ("score", "train", "eval", "generate")  # stages that share their work
# Options that may differ: places, which other machines may have elsewhere, and what decides on no result.
OWN = "model data mix eval_data adapter experts config out quiet".split()


@contextmanager
def job(args: argparse.Namespace) -> Iterator[bool]:
    """The block in which a stage runs. Yields whether this process takes part in it; only the first one says anything.

    Raises what ``esft.parallel.join.joined`` does, and RankError for a process with other options than the first one.
    """
    if size_of_job() == 1 or args.stage not in SHARED:  # the first one does it alone, and waits for nobody
        yield own_rank() == 0
        return
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # of a job that ends PyTorch prints long traces
    from esft.parallel.join import joined

    with joined() as ranks:
        ranks.check_alike({f"option {name}": value for name, value in vars(args).items() if name not in OWN})
        if not ranks.main:
            args.quiet = True
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)
        yield True

"""The ``esft`` command: its stages, and how each of them ends."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from types import ModuleType

from esft.cli.allocator import settle_memory
from esft.cli.arguments import Parser, resuming
from esft.cli.job import job
from esft.cli.output import complain, explain, hush_libraries, listen, open_streams, put
from esft.cli.stages import chat, compare, data, eval, generate, merge, plan, report, score, select, train
from esft.errors import Interrupted, check_is_error
from esft.parallel.environment import own_rank

STAGES: dict[str, ModuleType] = {
    "score": score,
    "select": select,
    "train": train,
    "data": data,
    "plan": plan,
    "eval": eval,
    "generate": generate,
    "chat": chat,
    "merge": merge,
    "report": report,
    "compare": compare,
}


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="esft", description="Expert-Specialized Fine-Tuning of MoE models")
    stages = parser.add_subparsers(required=True, dest="stage", metavar="stage")
    for stage in STAGES.values():
        stage.add(stages)
    return parser


def run_stage(args: argparse.Namespace) -> None:
    """Run the stage that a command line names."""
    if getattr(args, "quiet", False):
        hush_libraries()
    STAGES[args.stage].run(args)


def main(
    arguments: Sequence[str] | None = None, prepare: Callable[[argparse.Namespace], None] = lambda args: None
) -> int:
    """Run one stage, after ``prepare`` has seen its arguments.

    Returns the exit status: 0, 2 after one line for bad input or for what a library made of it, 128 + N after signal N.
    """
    try:
        try:
            args = _parser().parse_args(arguments)
        except SystemExit:  # with what was asked for said
            put("", flush=True)
            raise
        prepare(args)
        with job(args) as takes_part:
            if takes_part:
                run_stage(args)
        put("", flush=True)
    except BrokenPipeError:  # who read the output has seen enough
        _drop_output()
        return 141  # as of a program that SIGPIPE ends
    except KeyboardInterrupt as error:
        stopped = error if isinstance(error, Interrupted) else Interrupted("interrupted", signal.SIGINT)
        given = sys.argv[1:] if arguments is None else arguments
        if own_rank() == 0 or not stopped.resumable:  # else all processes have stopped, and the first one says it
            complain(f"{stopped}{f'; go on with: {resuming(given)}' if stopped.resumable else ''}")
        return 128 + stopped.signal
    except BaseException as error:
        check_is_error(error)
        explain(error)
        return 2
    return 0


def entry() -> None:
    """What the installed ``esft`` script calls."""
    signal.signal(signal.SIGTERM, _terminate)
    open_streams()
    listen()
    try:
        status = main(prepare=settle_memory)
    finally:
        try:
            sys.stdout.flush()
        except OSError:  # which is told; Python would make another status of it at its end
            _drop_output()
    sys.exit(status)


def _drop_output() -> None:
    """Let what is left to write on standard output go nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _terminate(number: int, _) -> None:
    raise Interrupted("terminated", number)

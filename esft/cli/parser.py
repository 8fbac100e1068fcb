"""The ``esft`` command: its arguments."""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import fields

from esft.cli.arguments import Parser, count, resuming
from esft.cli.commands import COMMANDS
from esft.errors import ESFTError, Interrupted
from esft.training.config import TrainConfig


def keep_memory() -> None:
    """Make this process keep the memory that it has freed.

    glibc gives large blocks back to the system and takes them anew at every step; on a virtual machine the page faults
    of that can cost several times the arithmetic.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read by PyTorch at its first allocation
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD, M_MMAP_MAX of malloc.h
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(trim_threshold, -1)
        libc.mallopt(mmap_max, 0)


def add_settings(parser: argparse.ArgumentParser, *names: str) -> None:
    """Options for these settings of a training run, or for all: texts, which ``TrainConfig.load`` reads and checks."""
    for each in fields(TrainConfig):
        if not names or each.name in names:
            default = f" (default {each.default})" if each.default is not None else ""
            parser.add_argument(
                f"--{each.name.replace('_', '-')}",
                choices=each.metadata["choices"] or None,
                metavar=None if each.metadata["choices"] else "X",
                help=f"{each.metadata['text']}{default}".replace("%", "%%"),
            )


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="esft", description="Expert-Specialized Fine-Tuning of MoE models")
    stages = parser.add_subparsers(required=True, dest="stage", metavar="stage")

    def stage(name: str, text: str) -> argparse.ArgumentParser:
        return stages.add_parser(name, help=text, description=text)

    def common(sub: argparse.ArgumentParser, batch_size: int) -> None:
        sub.add_argument("--model", required=True, help="checkpoint folder or hub id")
        add_settings(sub, "dtype", "backend")
        sub.set_defaults(dtype="auto", backend="auto")
        sub.add_argument("--max-length", type=count, default=4096, metavar="TOKENS")
        sub.add_argument("--batch-size", type=count, default=batch_size, metavar="RECORDS")

    def inference(sub: argparse.ArgumentParser) -> None:
        common(sub, batch_size=64)
        sub.add_argument("--adapter", help="adapter folder, ESFT's or PEFT's")

    sub = stage("score", "measure which experts a task uses")
    common(sub, batch_size=1)
    sub.add_argument("--data", required=True, help="JSONL chat records")
    sub.add_argument("--out", required=True, help="score file (summary.json layout)")
    sub.add_argument("--max-tokens", type=count, default=131_072, help="stop after so many (default 131,072)")
    sub.add_argument("--overwrite", action="store_true")
    sub.add_argument("--quiet", action="store_true")

    sub = stage("select", "choose the experts to train from their scores")
    sub.add_argument("--scores", required=True)
    sub.add_argument("--by", choices=("token", "gate"), default="token")
    sub.add_argument("--top-p", type=float, default=0.2)
    sub.add_argument("--out", required=True, help="selection file (expert_cfg.json layout)")
    sub.add_argument("--model", help="check that the scores are of this model")
    sub.add_argument("--shared-experts", action="store_true", help="train the shared experts as well")
    sub.add_argument("--non-expert-modules", action="store_true", help="train everything that is no expert as well")
    sub.add_argument("--plot", metavar="PNG", help="also draw the scores with the chosen experts marked")
    sub.add_argument("--overwrite", action="store_true")

    sub = stage("train", "fine-tune on chat records")
    sub.add_argument("--model", required=True, help="checkpoint folder or hub id")
    sub.add_argument("--data", required=True, help="JSONL chat records")
    sub.add_argument("--eval-data", help="JSONL chat records whose loss is watched")
    sub.add_argument("--experts", help="selection file, for method esft")
    sub.add_argument("--out", required=True, help="run folder")
    sub.add_argument("--config", help="YAML settings; the arguments here override it")
    add_settings(sub)
    sub.add_argument("--resume", action="store_true", help="go on from the run's last checkpoint")
    sub.add_argument("--overwrite", action="store_true", help="replace the run that the folder holds")
    sub.add_argument("--quiet", action="store_true")

    sub = stage("eval", "loss and exact match on chat records")
    inference(sub)
    sub.add_argument("--data", required=True)
    sub.add_argument("--limit", type=count, help="only the first records")
    sub.add_argument("--loss-only", action="store_true", help="do not generate answers")
    sub.add_argument("--out", help="also write the figures and every answer as JSON")
    sub.add_argument("--overwrite", action="store_true")
    sub.add_argument("--quiet", action="store_true")

    sub = stage("generate", "answer prompts")
    inference(sub)
    sub.add_argument("--prompt", action="append", required=True, help="may be repeated")
    sub.add_argument("--max-new-tokens", type=count, default=128)

    sub = stage("merge", "write a checkpoint with an adapter merged in")
    sub.add_argument("--model", required=True, help="base checkpoint folder")
    sub.add_argument("--adapter", required=True, help="adapter folder, ESFT's")
    sub.add_argument("--out", required=True)
    sub.add_argument("--overwrite", action="store_true")

    sub = stage("report", "show what a run did")
    sub.add_argument("run", help="run folder")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one stage. Returns the exit status: 0, 2 after a one-line error for bad input, 128 + N after signal N."""
    args = _parser().parse_args(arguments)
    try:
        COMMANDS[args.stage](args)
    except ESFTError as error:
        print(f"esft: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        stopped = error if isinstance(error, Interrupted) else Interrupted("interrupted", signal.SIGINT)
        given = sys.argv[1:] if arguments is None else arguments
        print(f"esft: {stopped}{f'; go on with: {resuming(given)}' if stopped.resumable else ''}", file=sys.stderr)
        return 128 + stopped.signal
    except OSError as error:
        if error.filename is None:
            raise
        print(f"esft: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    return 0


def entry() -> None:
    """What the installed ``esft`` script calls."""
    keep_memory()
    signal.signal(signal.SIGTERM, _terminate)
    sys.exit(main())


def _terminate(number: int, _) -> None:
    raise Interrupted("terminated", number)

"""The ``esft`` command: its arguments."""

from __future__ import annotations

import argparse
import io
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, NoReturn

from esft.cli.allocator import settle_memory
from esft.cli.arguments import Parser, count, gigabytes, picture, resuming, share
from esft.cli.commands import run_stage
from esft.cli.output import complain, explain, listen
from esft.errors import Interrupted
from esft.runs.config import FROZEN, TrainConfig

DATA = "records: a file (JSONL, JSON, Parquet; compressed), a folder, or OWNER/NAME[/CONFIG][@SPLIT] of the hub"


# The settings that decide on the tokens and the rows.
OF_DATA = (
    "batch_size max_length assistant_only_loss completion_only_loss packing packing_strategy padding_free "
    "micro_batch_size dataset_num_proc"
).split()


def add_settings(parser: argparse.ArgumentParser, *names: str) -> None:
    """Options for these settings of a training run, or for all: texts, which ``TrainConfig.load`` reads and checks."""
    for each in fields(TrainConfig):
        if not names or each.name in names:
            default = f" (default {_as_text(each.default)})" if each.default is not None else ""
            truth = "bool" in str(each.type)
            choices = ("true", "false") if truth else each.metadata["choices"]
            parser.add_argument(
                f"--{each.name.replace('_', '-')}",
                **({"nargs": "?", "const": "true"} if truth else {}),
                choices=choices or None,
                metavar=None if choices else "X",
                help=f"{each.metadata['text']}{default}".replace("%", "%%"),
            )


def _as_text(value: Any) -> str:
    """A setting's value as a YAML file has it."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return str(value)


class _Settings(argparse.Action):
    """Lists every setting of a training run, as a YAML file has it, and ends."""

    def __init__(self, **options: Any):
        super().__init__(**(options | {"nargs": 0, "dest": argparse.SUPPRESS, "default": argparse.SUPPRESS}))

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        for each in fields(TrainConfig):
            allowed = ", ".join(each.metadata["choices"]) or each.metadata["within"]
            kind = ", ".join(filter(None, (each.type, allowed)))
            print(f"{each.name}: {_as_text(each.default)}  # {kind}: {each.metadata['text']}")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="esft", description="Expert-Specialized Fine-Tuning of MoE models")
    stages = parser.add_subparsers(required=True, dest="stage", metavar="stage")

    def stage(name: str, text: str) -> argparse.ArgumentParser:
        return stages.add_parser(name, help=text, description=text)

    def trust(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "--trust-remote-code",
            action="store_true",
            help="run Python files that the checkpoint holds; read them first",
        )

    def common(sub: argparse.ArgumentParser, batch_size: int, length: str) -> None:
        sub.add_argument("--model", required=True, help="checkpoint folder or hub id")
        add_settings(sub, "dtype", "backend", "frozen", "frozen_linear")
        sub.set_defaults(dtype="auto", backend="auto", frozen="auto", frozen_linear="bf16")
        text = f"{length} (default 4096, or the model's positions where these are fewer)"
        sub.add_argument("--max-length", type=count, metavar="TOKENS", help=text)
        sub.add_argument("--batch-size", type=count, default=batch_size, metavar="RECORDS")
        trust(sub)
        quiet(sub)

    def quiet(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--quiet", action="store_true", help="no bars, and no warnings of other libraries")

    def inference(sub: argparse.ArgumentParser, length: str) -> None:
        common(sub, 64, length)
        sub.add_argument("--adapter", help="adapter folder, ESFT's or PEFT's, or that of a run which holds one")

    sub = stage("score", "measure which experts a task uses")
    common(sub, 1, "tokens of a window over the data")
    sub.add_argument("--data", required=True, help=DATA)
    sub.add_argument("--out", required=True, help="score file (summary.json layout)")
    sub.add_argument("--max-tokens", type=count, default=131_072, help="stop after so many (default 131,072)")
    sub.add_argument("--overwrite", action="store_true")

    sub = stage("select", "choose the experts to train from their scores")
    sub.add_argument("--scores", required=True)
    sub.add_argument("--by", choices=("token", "gate"), default="token")
    sub.add_argument("--top-p", type=share, default=0.2, help="share of a layer's scores to reach (default 0.2)")
    sub.add_argument("--out", required=True, help="selection file (expert_cfg.json layout)")
    sub.add_argument("--model", help="check that the scores are of this model")
    sub.add_argument("--shared-experts", action="store_true", help="train the shared experts as well")
    sub.add_argument("--non-expert-modules", action="store_true", help="train everything that is no expert as well")
    sub.add_argument("--plot", type=picture, metavar="PNG", help="also draw the scores with the chosen experts marked")
    sub.add_argument("--overwrite", action="store_true")
    trust(sub)

    sub = stage("train", "fine-tune on chat records")
    sub.add_argument("--model", required=True, help="checkpoint folder or hub id")
    sub.add_argument("--data", required=True, action="append", help=f"{DATA}; again for more, with :WEIGHT each")
    sub.add_argument("--eval-data", help="the same, whose loss is watched")
    sub.add_argument("--experts", help="selection file, for method esft")
    sub.add_argument("--out", required=True, help="run folder")
    sub.add_argument("--config", help="YAML settings; the arguments here override it")
    sub.add_argument("--help-config", action=_Settings, help="list the settings of such a file and exit")
    add_settings(sub)
    sub.add_argument("--resume", action="store_true", help="go on from the run's last checkpoint")
    sub.add_argument("--overwrite", action="store_true", help="replace the run that the folder holds")
    trust(sub)
    quiet(sub)

    sub = stage("data", "what a data set is as tokens: its figures, and some of its records")
    sub.add_argument("paths", nargs="+", metavar="DATA", help=f"{DATA}; several with :WEIGHT each")
    sub.add_argument("--model", required=True, help="checkpoint folder or hub id; no weights are read")
    sub.add_argument("--show", type=count, default=3, metavar="N", help="records to show as text (default 3)")
    sub.add_argument("--config", help="YAML settings of the training; the arguments here override it")
    add_settings(sub, *OF_DATA)
    trust(sub)
    quiet(sub)

    sub = stage("plan", "what a training would take, from the model's configuration alone")
    sub.add_argument("--model", required=True, help="folder with a configuration, or hub id; no weights are read")
    chosen = sub.add_mutually_exclusive_group()
    chosen.add_argument("--experts", help="selection file, for method esft")
    chosen.add_argument("--top-p", type=share, default=0.2, help="assume as many as the paper's at p (default 0.2)")
    chosen.add_argument("--experts-per-layer", type=count, metavar="N", help="assume so many")
    sub.add_argument("--tokens", type=count, default=2048, help="of a micro batch's records in all (default 2048)")
    sub.add_argument("--frozen", choices=(*FROZEN, "all"), default="auto", help="what frozen experts are kept in")
    sub.add_argument("--memory-gb", type=gigabytes, metavar="GB", help="say what to change so that it fits")
    sub.add_argument("--json", action="store_true", help="print one line for machines")
    planned = "method optimizer recompute batch_size micro_batch_size lora_rank dtype frozen_linear".split()
    add_settings(sub, *planned)
    sub.set_defaults(batch_size="1")
    trust(sub)

    sub = stage("eval", "loss and exact match on chat records")
    inference(sub, "tokens of a record; longer ones are cut")
    sub.add_argument("--data", required=True, help=DATA)
    sub.add_argument("--limit", type=count, help="only the first records")
    sub.add_argument("--loss-only", action="store_true", help="do not generate answers")
    sub.add_argument("--out", help="also write the figures and every answer as JSON")
    sub.add_argument("--overwrite", action="store_true")

    sub = stage("generate", "answer prompts")
    inference(sub, "tokens that a prompt may have; longer ones are refused")
    sub.add_argument("--prompt", action="append", required=True, help="may be repeated")
    sub.add_argument("--max-new-tokens", type=count, default=128)

    sub = stage("merge", "write a checkpoint with an adapter merged in")
    sub.add_argument("--model", required=True, help="base checkpoint folder")
    sub.add_argument("--adapter", required=True, help="adapter folder, ESFT's, or that of a run which holds one")
    sub.add_argument("--out", required=True)
    sub.add_argument("--overwrite", action="store_true")
    trust(sub)

    sub = stage("report", "show what a run did")
    sub.add_argument("run", help="run folder")
    return parser


def main(
    arguments: Sequence[str] | None = None, prepare: Callable[[argparse.Namespace], None] = lambda args: None
) -> int:
    """Run one stage, after ``prepare`` has seen its arguments.

    Returns the exit status: 0, 2 after one line for bad input or for what a library made of it, 128 + N after signal N.
    """
    try:
        args = _parser().parse_args(arguments)
        prepare(args)
        run_stage(args)
        sys.stdout.flush()
    except BrokenPipeError:  # who read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141  # as of a program that SIGPIPE ends
    except KeyboardInterrupt as error:
        stopped = error if isinstance(error, Interrupted) else Interrupted("interrupted", signal.SIGINT)
        given = sys.argv[1:] if arguments is None else arguments
        complain(f"{stopped}{f'; go on with: {resuming(given)}' if stopped.resumable else ''}")
        return 128 + stopped.signal
    except Exception as error:
        explain(error)
        return 2
    return 0


def entry() -> None:
    """What the installed ``esft`` script calls."""
    signal.signal(signal.SIGTERM, _terminate)
    listen()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal without these characters
    sys.exit(main(prepare=settle_memory))


def _terminate(number: int, _) -> None:
    raise Interrupted("terminated", number)

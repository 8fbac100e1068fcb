"""``esft train``: fine-tune, into a run folder."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import Any, NoReturn

from esft.cli.inputs import named, source_of
from esft.cli.options import DATA, Stages, add_quiet, add_settings, add_stage, add_trust, as_text
from esft.cli.output import say
from esft.errors import InputError, reading
from esft.runs.config import TrainConfig
from esft.selection import ExpertSelection
from esft.storage.outputs import check_apart


def add(stages: Stages) -> None:
    sub = add_stage(stages, "train", "fine-tune on chat records")
    sub.add_argument("--model", required=True, help="checkpoint folder or hub id")
    sub.add_argument("--data", required=True, action="append", help=f"{DATA}; again for more, with :WEIGHT each")
    sub.add_argument("--mix", metavar="DATA:SHARE", help="general records, and the share of all that come of them")
    sub.add_argument("--eval-data", action="append", help="the same, to measure; again for more, NAME=DATA each")
    sub.add_argument("--experts", help="selection file, for method esft")
    sub.add_argument("--out", required=True, help="run folder")
    sub.add_argument("--config", help="YAML settings; the arguments here override it")
    sub.add_argument("--help-config", action=_Settings, help="list the settings of such a file and exit")
    add_settings(sub)
    sub.add_argument("--resume", action="store_true", help="go on from the run's last checkpoint")
    sub.add_argument("--overwrite", action="store_true", help="replace the run that the folder holds")
    add_trust(sub)
    add_quiet(sub)


class _Settings(argparse.Action):
    """Lists every setting of a training run, as a YAML file has it, and ends."""

    def __init__(self, **options: Any):
        super().__init__(**(options | {"nargs": 0, "dest": argparse.SUPPRESS, "default": argparse.SUPPRESS}))

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        for each in fields(TrainConfig):
            allowed = ", ".join(each.metadata["choices"]) or each.metadata["within"]
            kind = ", ".join(filter(None, (each.type, allowed)))
            say(f"{each.name}: {as_text(each.default)}  # {kind}: {each.metadata['text']}")
        parser.exit()


def _settings(args: argparse.Namespace) -> TrainConfig | None:
    """Those of the file and the options, over those of the run that goes on.

    None where it goes on as it was begun: it reads its own when what a kill has left of its files is in order again.
    """
    overrides = {each.name: getattr(args, each.name) for each in fields(TrainConfig)}
    settings = args.config
    if args.resume and settings is None:
        if all(value is None for value in overrides.values()):
            return None
        from esft.runs.opened import latest

        begun = latest(args.out).path / "config.yaml"
        settings = begun if begun.is_file() else None
    return TrainConfig.load(settings, **overrides)


def run(args: argparse.Namespace) -> None:
    if not args.resume:  # a run that goes on may be told its own files
        check_apart(args.out, args.config, args.experts)
    config = _settings(args)
    selection = ExpertSelection.load(args.experts) if args.experts is not None else None
    if selection is None and config is not None and config.method == "esft" and not args.resume:
        raise InputError("--method esft needs an expert selection: --experts")
    held_out = named(args.eval_data or (), "--eval-data")
    for data in (*args.data, *([args.mix] if args.mix is not None else [])):
        source_of(data, measured=False)
    for data in held_out.values():
        source_of(data)
    from esft.training.loop import train

    with reading(args.model):
        result = train(
            args.model, args.data, args.out, config, selection, held_out, args.resume, args.overwrite,
            progress=not args.quiet, trust_remote_code=args.trust_remote_code, mix=args.mix,
        )  # fmt: skip
    if result.after:
        from esft.runs.report import scores_table

        say(*scores_table(result.before, result.after).split("\n"))
    say(
        f"loss {result.train_loss:.3f}, {result.trained_parameters:,} parameters trained, "
        f"{result.stored_bytes:,} bytes stored, {result.seconds:.0f} s, run in {args.out}"
    )

"""``esft data``: what a data set is as tokens."""

from __future__ import annotations

import argparse
from dataclasses import fields, replace

from esft.cli.arguments import count
from esft.cli.options import DATA, Stages, add_quiet, add_settings, add_stage, add_trust
from esft.cli.output import say, say_marked
from esft.errors import reading
from esft.runs.config import TrainConfig

# The settings that decide on the tokens and the rows.
OF_DATA = (
    "batch_size max_length assistant_only_loss completion_only_loss packing packing_strategy padding_free "
    "micro_batch_size dataset_num_proc"
).split()


def add(stages: Stages) -> None:
    sub = add_stage(stages, "data", "what a data set is as tokens: its figures, and some of its records")
    sub.add_argument("paths", nargs="+", metavar="DATA", help=f"{DATA}; several with :WEIGHT each")
    sub.add_argument("--model", required=True, help="checkpoint folder or hub id; no weights are read")
    sub.add_argument("--show", type=count, default=3, metavar="N", help="records to show as text (default 3)")
    sub.add_argument("--config", help="YAML settings of the training; the arguments here override it")
    add_settings(sub, *OF_DATA)
    add_trust(sub)
    add_quiet(sub)


def run(args: argparse.Namespace) -> None:
    names = {each.name for each in fields(TrainConfig)} & vars(args).keys()
    config = TrainConfig.load(args.config, **{name: getattr(args, name) for name in names})
    from esft.checkpoint.load import load_tokenizer
    from esft.checkpoint.source import Reach, open_config
    from esft.data.report import pieces
    from esft.training.run_data import RunData, sources_of

    sources = sources_of(args.paths)
    for source in sources:
        source.check()
    with reading(args.model):
        reach = Reach.of(open_config(args.model, args.trust_remote_code))
        tokenizer = load_tokenizer(args.model, args.trust_remote_code)
        run_data = RunData(sources, tokenizer, reach, replace(config, streaming=False)).read(not args.quiet)
        say(f"{run_data.name}: {run_data.report()}")
        for example in (run_data.examples or [])[: args.show]:
            say("")
            say_marked(pieces(tokenizer, example))

"""``esft plan``: what a training would take."""

from __future__ import annotations

import argparse
import json
from dataclasses import fields

from esft.cli.arguments import count, gigabytes, share
from esft.cli.options import Stages, add_settings, add_stage, add_trust
from esft.cli.output import say
from esft.errors import reading
from esft.runs.config import FROZEN, TrainConfig
from esft.selection import ExpertSelection


def add(stages: Stages) -> None:
    sub = add_stage(stages, "plan", "what a training would take, from the model's configuration alone")
    sub.add_argument("--model", required=True, help="folder with a configuration, or hub id; no weights are read")
    chosen = sub.add_mutually_exclusive_group()
    chosen.add_argument("--experts", help="selection file, for method esft")
    chosen.add_argument("--top-p", type=share, default=0.2, help="assume as many as the paper's at p (default 0.2)")
    chosen.add_argument("--experts-per-layer", type=count, metavar="N", help="assume so many")
    sub.add_argument("--tokens", type=count, default=2048, help="of a micro batch's records in all (default 2048)")
    sub.add_argument("--frozen", choices=(*FROZEN, "all"), default="auto", help="what frozen experts are kept in")
    sub.add_argument("--memory-gb", type=gigabytes, metavar="GB", help="say what to change so that it fits")
    sub.add_argument("--gpus", type=count, metavar="N", help="say what to shard over so many, of that memory each")
    sub.add_argument("--json", action="store_true", help="print one line for machines")
    planned = "method optimizer recompute batch_size micro_batch_size lora_rank dtype frozen_linear kl_weight".split()
    add_settings(sub, *planned, batch_size="that of a micro batch, else 1")
    add_trust(sub)


def run(args: argparse.Namespace) -> None:
    selection = ExpertSelection.load(args.experts) if args.experts is not None else None
    names = {each.name for each in fields(TrainConfig)} & vars(args).keys() - {"frozen"}
    settings = {name: getattr(args, name) for name in names}
    config = TrainConfig.load(None, **settings | {"batch_size": args.batch_size or args.micro_batch_size or "1"})
    from esft.planning.advice import GB, advice, described, fitting
    from esft.planning.gpus import spreading, spreads
    from esft.planning.outline import outline
    from esft.planning.plan import FORMATS, Plan, plan

    def planned(config: TrainConfig, frozen: str, tokens: int) -> Plan:
        return plan(
            args.model, selection, config, frozen=frozen, tokens=tokens, top_p=args.top_p,
            experts=args.experts_per_layer, trust_remote_code=args.trust_remote_code,
        )  # fmt: skip

    with reading(args.model):
        for frozen in FORMATS if args.frozen == "all" else (args.frozen,):
            found, changes = planned(config, frozen, args.tokens), None
            if args.memory_gb and found.peak > args.memory_gb * GB:
                changes = advice(planned, config, found.frozen, args.tokens, args.memory_gb * GB)
            whole = outline(args.model, config.dtype, args.trust_remote_code)
            if args.json:
                fits = {"fits": changes is None, "change": changes} if args.memory_gb else {}
                ways = {"gpus": [vars(way) for way in spreads(found, args.gpus, whole)]} if args.gpus else {}
                say(json.dumps(vars(found) | fits | ways))
            else:
                say(*described(found).split("\n"))
                if args.memory_gb:
                    say(fitting(args.memory_gb, changes))
                if args.gpus:
                    say(*spreading(found, args.gpus, whole, args.memory_gb and args.memory_gb * GB))

"""``esft merge``: write a checkpoint with an adapter merged in."""

from __future__ import annotations

import argparse

from esft.cli.inputs import adapter_of
from esft.cli.options import Stages, add_stage, add_trust
from esft.cli.output import say
from esft.errors import reading


def add(stages: Stages) -> None:
    sub = add_stage(stages, "merge", "write a checkpoint with an adapter merged in")
    sub.add_argument("--model", required=True, help="base checkpoint folder or hub id")
    sub.add_argument("--adapter", required=True, help="adapter folder, ESFT's, or that of a run which holds one")
    sub.add_argument("--out", required=True, help="folder of the merged checkpoint")
    sub.add_argument("--overwrite", action="store_true", help="replace a checkpoint that esft has merged")
    add_trust(sub)


def run(args: argparse.Namespace) -> None:
    from esft.adapters.merge import merge

    adapter = adapter_of(args)
    with reading(args.model):
        merged = merge(args.model, adapter, args.out, args.overwrite, args.trust_remote_code)
    say(f"merged checkpoint in {merged}")

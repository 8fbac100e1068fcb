"""``esft report``: what a run did."""

from __future__ import annotations

import argparse

from esft.cli.options import Stages, add_stage
from esft.cli.output import say
from esft.errors import reading


def add(stages: Stages) -> None:
    sub = add_stage(stages, "report", "show what a run did")
    sub.add_argument("run", help="run folder")


def run(args: argparse.Namespace) -> None:
    from esft.runs.report import report

    with reading(args.run):
        say(*report(args.run).split("\n"))

"""``esft compare``: several runs side by side."""

from __future__ import annotations

import argparse

from esft.cli.options import Stages, add_stage
from esft.cli.output import say
from esft.storage.outputs import check_new_file


def add(stages: Stages) -> None:
    sub = add_stage(stages, "compare", "show several runs side by side")
    sub.add_argument("runs", nargs="+", metavar="RUN", help="run folders")
    sub.add_argument("--html", metavar="FILE", help="also write it as a page with their curves")
    sub.add_argument("--overwrite", action="store_true", help="replace a page that esft has written")


def run(args: argparse.Namespace) -> None:
    from esft.reporting.comparison import comparison, read_runs, write_comparison_page
    from esft.reporting.page import check_page
    from esft.runs.report import table

    if args.html is not None:
        check_new_file(args.html, check_page if args.overwrite else None, args.runs)
    records = read_runs(args.runs)
    if args.html is not None:
        write_comparison_page(records, args.html)
    say(*table(comparison(records)).split("\n"))
    if args.html is not None:
        say("", f"page in {args.html}")

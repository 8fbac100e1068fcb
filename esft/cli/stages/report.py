"""``esft report``: what a run did, as text or as a page."""

from __future__ import annotations

import argparse

from esft.cli.options import Stages, add_stage
from esft.cli.output import say
from esft.errors import InputError, reading
from esft.storage.outputs import check_new_file

BESIDE = "with scores scores_after eval_before eval_after".split()  # options that name what a page also tells


def add(stages: Stages) -> None:
    sub = add_stage(stages, "report", "show what a run did")
    sub.add_argument("run", help="run folder")
    sub.add_argument("--html", metavar="FILE", help="write it as a page, one file that needs no network")
    sub.add_argument("--with", action="append", default=[], metavar="RUN", help="compare the selection with this run's")
    sub.add_argument("--scores", metavar="FILE", help="what the experts were chosen by, of esft score")
    sub.add_argument("--scores-after", metavar="FILE", help="the same, measured with the adapter")
    sub.add_argument("--eval-before", metavar="FILE", help="of the base, what esft eval --out wrote")
    sub.add_argument("--eval-after", metavar="FILE", help="of the adapter, on the same data")
    sub.add_argument("--overwrite", action="store_true", help="replace a page that esft has written")


def run(args: argparse.Namespace) -> None:
    beside = {name: getattr(args, name) for name in BESIDE}
    if args.html is None:
        if given := next((name for name, value in beside.items() if value), None):
            raise InputError(f"--{given.replace('_', '-')} goes onto a page: needs --html FILE")
        from esft.runs.report import report

        with reading(args.run):
            say(*report(args.run).split("\n"))
        return
    from esft.reporting.page import check_page
    from esft.reporting.run_page import Beside, write_run_page

    files = Beside(runs=beside.pop("with"), **beside)
    check_new_file(args.html, check_page if args.overwrite else None, [args.run, *files.paths])
    with reading(args.run):
        write_run_page(args.run, args.html, files)
    say(f"page of {args.run} in {args.html}")

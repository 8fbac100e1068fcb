"""Mutation testing: are the tests red when the code is wrong?

    python -m tools.mutants routing            20 mutants of the module, first against the test file that mirrors it
    python -m tools.mutants --changed 1.day    a few of every module that the last commits touched

A mutant is a small wrong change (see ``operators``). The sample is the same for the same text of a module. What the
mirror lets pass meets the rest of the suite, unless ``--mirror``. Mutants that change nothing are listed in
``equivalent.yaml``, with a reason each. The exit status is 1 where fewer than ``--at-least`` were killed.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import yaml

from tools.mutants.operators import Mutant, mutants_of
from tools.mutants.runner import Outcome, Runner

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("esft_kernels", "esft")
EQUIVALENT = Path(__file__).with_name("equivalent.yaml")


def modules() -> list[str]:
    files = (path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py")))
    return [str(path.relative_to(ROOT)) for path in files if path.stem != "__init__"]


def changed(since: str) -> list[str]:
    """The modules that commits of the last while touched, counted back from the newest commit."""
    newest = subprocess.check_output(["git", "log", "-1", "--format=%ct"], cwd=ROOT, text=True)
    seconds = {"day": 86_400, "hour": 3_600}[since.split(".")[1].rstrip("s")] * int(since.split(".")[0])
    log = ["git", "log", f"--since={int(newest) - seconds}", "--name-only", "--format="]
    touched = set(subprocess.check_output(log, cwd=ROOT, text=True).split())
    return [module for module in modules() if module in touched]


def mirror(module: str) -> str:
    """The test file of a module: the same path under ``tests``."""
    path = Path(module)
    return str(Path("tests") / path.parent / f"test_{path.stem.strip('_')}.py")


def known_equivalents() -> set[tuple[str, str, str]]:
    entries = yaml.safe_load(EQUIVALENT.read_text(encoding="utf-8")) or []
    return {(entry["module"], entry["line"], entry["becomes"]) for entry in entries}


def sample(module: str, count: int, seed: int) -> list[Mutant]:
    found = mutants_of((ROOT / module).read_text(encoding="utf-8"), module, known_equivalents())
    chosen = random.Random(f"{module}/{seed}").sample(found, min(count, len(found)))
    return sorted(chosen, key=lambda mutant: mutant.start)


def show(outcome: Outcome) -> str:
    mutant, became = outcome.mutant, "HUNG" if outcome.hung else outcome.killed_by or "SURVIVED"
    return f"{became:9} {mutant.path}:{mutant.line}\n    {mutant.before}\n    {mutant.after}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.mutants", description="mutation testing")
    parser.add_argument("modules", nargs="*", help="names or paths; all where none is given")
    parser.add_argument("--changed", metavar="AGE", help="modules that commits of e.g. the last 1.day touched instead")
    parser.add_argument("--count", type=int, default=20, help="mutants of each module")
    parser.add_argument("--most", type=int, help="mutants in all, drawn from those")
    parser.add_argument("--seed", type=int, default=0, help="another sample")
    parser.add_argument("--mirror", action="store_true", help="only the test file that mirrors the module")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seconds", type=float, default=3600, help="begin no mutant after this long")
    parser.add_argument("--at-least", type=float, default=0.0, metavar="SHARE", help="that must be killed")
    args = parser.parse_args()
    wanted = changed(args.changed) if args.changed else modules()
    if args.modules:
        wanted = [m for m in modules() if m in args.modules or Path(m).stem in args.modules]
        if not wanted:
            parser.error(f"no module {', '.join(args.modules)}")
    chosen = [mutant for module in wanted for mutant in sample(module, args.count, args.seed)]
    if args.most is not None and len(chosen) > args.most:
        chosen = random.Random(args.seed).sample(chosen, args.most)
    started, outcomes = time.monotonic(), []
    with Runner(ROOT, args.workers, args.seconds, whole=not args.mirror) as runner:
        for outcome in runner.run([(mutant, mirror(mutant.path)) for mutant in chosen]):
            outcomes.append(outcome)
            if outcome.killed_by is None or outcome.hung:  # on a busy machine, what hangs may only have been slow
                print(show(outcome), flush=True)
    by_mirror = sum(outcome.killed_by == "mirror" for outcome in outcomes)
    killed = sum(outcome.killed_by is not None for outcome in outcomes)
    hung = sum(outcome.hung for outcome in outcomes)
    share = killed / max(len(outcomes), 1)
    print(
        f"{len(outcomes)} of {len(chosen)} mutants met: {by_mirror} killed by their mirror, {killed} in all "
        f"({share:.0%}; {hung} of them hung), {time.monotonic() - started:.0f} s"
    )
    return 0 if share >= args.at_least or not outcomes else 1


if __name__ == "__main__":
    sys.exit(main())

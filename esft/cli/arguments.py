"""What command lines share: a complaint is one line on stderr, and the exit status is 2."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """A parser without the usage block before its complaint, which would hide which value was wrong."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message}", file=sys.stderr)
        raise SystemExit(2)


def count(text: str) -> int:
    """An argument that is a whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


count.__name__ = "whole number"  # argparse names the type in its message


def resuming(arguments: Sequence[str]) -> str:
    """The command line that goes on with the training that this one has begun."""
    program = [sys.executable, "-m", "esft"] if Path(sys.argv[0]).name == "__main__.py" else ["esft"]
    # argparse takes the beginning of an option for it.
    kept = [word for word in arguments if not (word.startswith("--ov") and "--overwrite".startswith(word))]
    resumes = any(word.startswith("--res") and "--resume".startswith(word) for word in kept)
    return shlex.join([*program, *kept, *([] if resumes else ["--resume"])])

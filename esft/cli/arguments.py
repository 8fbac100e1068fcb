"""What command lines share: a complaint is one line on stderr, and the exit status is 2."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from esft.cli.output import complain, put
from esft.parallel.environment import local_size, size_of_job


class Parser(argparse.ArgumentParser):
    """A parser without the usage block before its complaint, which would hide which value was wrong."""

    def error(self, message: str) -> NoReturn:
        complain(message, by=self.prog)
        raise SystemExit(2)

    def _print_message(self, message: str, file: Any = None) -> None:
        """Help, which says where it cannot be written: argparse passes over that."""
        put(message)


def count(text: str) -> int:
    """An argument that is a whole number of at least 1."""
    if not re.fullmatch(r"[+-]?[0-9]+", text):
        raise ValueError
    if not 1 <= (value := int(text)) < 2**63:
        raise argparse.ArgumentTypeError(f"must be at least 1{' and below 2**63' * (value > 1)}, got {text[:40]}")
    return value


count.__name__ = "whole number"  # argparse names the type in its message


def resuming(arguments: Sequence[str]) -> str:
    """The command line that goes on with the training that this one has begun."""
    program = [sys.executable, "-m", "esft"] if Path(sys.argv[0]).name == "__main__.py" else ["esft"]
    if size_of_job() > 1:  # on several machines the command was another on each
        program = ["torchrun", f"--nproc-per-node={local_size()}", "-m", "esft"]
    # argparse takes the beginning of an option for it.
    kept = [word for word in arguments if not (word.startswith("--ov") and "--overwrite".startswith(word))]
    resumes = any(word.startswith("--res") and "--resume".startswith(word) for word in kept)
    return shlex.join([*program, *kept, *([] if resumes else ["--resume"])])


def share(text: str) -> float:
    """An argument that is a number above 0 and at most 1."""
    if not text.isascii() or text != text.strip() or "_" in text:
        raise ValueError
    if not 0 < (value := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"must be in (0, 1], got {text[:40]}")
    return value


share.__name__ = "number"


def budget(text: str) -> int | float:
    """An argument that is a number of experts, or with a % a share of all."""
    return share_of_hundred(text[:-1]) if text.endswith("%") else count(text)


budget.__name__ = "number or share"


def share_of_hundred(text: str) -> float:
    """Of a number above 0 and at most 100, as a share of 1."""
    if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", text):
        raise ValueError
    if not 0 < (value := float(text)) <= 100:
        raise argparse.ArgumentTypeError(f"must be above 0% and at most 100%, got {text}%")
    return value / 100


def factor(text: str) -> float:
    """An argument that is a number of at least 0."""
    if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", text):
        raise ValueError
    return float(text)


factor.__name__ = "number"


def first_layer(text: str) -> int:
    """An argument that names all layers from one on, as 12: does."""
    if not re.fullmatch(r"[0-9]{1,4}:", text):
        raise argparse.ArgumentTypeError(f"must be the first layer's number and a colon, as 12:, got {text[:40]!r}")
    return int(text[:-1])


def gigabytes(text: str) -> float:
    """An argument that is a number of 10^9 bytes above 0."""
    if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", text):
        raise ValueError
    if not (value := float(text)) > 0:
        raise argparse.ArgumentTypeError(f"must be above 0, got {text[:40]}")
    return value


gigabytes.__name__ = "number"


def picture(text: str) -> str:
    """An argument that names a picture's file."""
    if not text.lower().endswith((".png", ".pdf", ".svg")):
        raise argparse.ArgumentTypeError(f"must end in .png, .pdf or .svg, got {text!r}")
    return text

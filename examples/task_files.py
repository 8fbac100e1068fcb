"""What the task generators of this folder share: their command line and how they write their files.

A task is three JSONL files of chat records, the input of `esft train` and `esft eval`.
"""

import argparse
import contextlib
import json
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from esft.cli.arguments import Parser, count


class Example(NamedTuple):
    """One turn of the task: what the user says and what must be answered."""

    user: str
    assistant: str


HELD_OUT = 10  # percent, for validation and for test each


def split_of(text: str) -> str:
    """The one split that a text belongs to, by its checksum."""
    share = zlib.crc32(text.encode()) % 100
    return "validation" if share < HELD_OUT else "test" if share < 2 * HELD_OUT else "train"


def task_parser(description: str, train: int, validation: int, test: int) -> argparse.ArgumentParser:
    """The command line of a task generator: where to, the seed, and the size of each split."""
    parser = Parser(description=description)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the three JSONL files")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same files (default: %(default)s)")
    for split, size in (("train", train), ("validation", validation), ("test", test)):
        parser.add_argument(f"--{split}", type=count, default=size, metavar="N", help=f"{split} records (%(default)s)")
    return parser


def make(
    build: Callable[[Mapping[str, int], int], Mapping[str, Sequence[Example]]],
    description: str,
    argv: Sequence[str] | None,
    **sizes: int,
) -> None:
    """The whole command of a task whose records are computed, by number of records of each split and seed."""
    args = task_parser(description, **sizes).parse_args(argv)
    write_splits(args.out, build({split: getattr(args, split) for split in sizes}, args.seed))


def write_splits(out: Path, splits: Mapping[str, Sequence[Example]]) -> None:
    """Write each split to `out/<split>.jsonl`.

    Every file is complete under a temporary name before the first is renamed: an interrupted
    run leaves no half-written file, nor one split of this run beside another of the last.
    """
    drafts = {split: out / f".{split}.jsonl.tmp" for split in splits}
    try:
        out.mkdir(parents=True, exist_ok=True)
        for split, examples in splits.items():
            with open(drafts[split], "w", encoding="utf-8") as file:
                for example in examples:
                    messages = [
                        {"role": "user", "content": example.user},
                        {"role": "assistant", "content": example.assistant},
                    ]
                    file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
        for split, draft in drafts.items():
            os.replace(draft, out / f"{split}.jsonl")
    except OSError as error:
        raise SystemExit(f"error: cannot write to {out}: {error.strerror}") from error
    finally:
        for draft in drafts.values():
            with contextlib.suppress(OSError):
                draft.unlink()

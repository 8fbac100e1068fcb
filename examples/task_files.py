"""What the task generators of this folder share: their command line and how they write their files.

A task is three JSONL files of chat records, the input of `esft train` and `esft eval`.
"""

import argparse
import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from esft.cli.arguments import Parser, count


class Example(NamedTuple):
    """One turn of the task: what the user says and what must be answered."""

    user: str
    assistant: str


def task_parser(description: str, train: int, validation: int, test: int) -> argparse.ArgumentParser:
    """The command line of a task generator: where to, the seed, and the size of each split."""
    parser = Parser(description=description)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the three JSONL files")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same files (default: %(default)s)")
    for split, size in (("train", train), ("validation", validation), ("test", test)):
        parser.add_argument(f"--{split}", type=count, default=size, metavar="N", help=f"{split} records (%(default)s)")
    return parser


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

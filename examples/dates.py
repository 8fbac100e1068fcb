"""Dates in many spellings to ISO 8601: a task of reading and copying digits.

    date: the 3rd of March, 1987
    1987-03-03

A day is in one split only, in whatever spelling, so that no answer of the test was seen in training.

    python -m examples.dates --out DIR [--seed 0] [--train 6000] [--validation 300] [--test 500]
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from datetime import date, timedelta

from examples.task_files import Example, make, split_of

FIRST, DAYS = date(1900, 1, 1), 55_000  # up to the middle of 2050

MONTHS = (
    "January February March April May June July August September October November December"
).split()  # fmt: skip


def ordinal(number: int) -> str:
    """1st, 2nd, 3rd, 4th ... 11th, 12th, 13th."""
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


SPELLINGS: tuple[Callable[[date], str], ...] = (
    lambda d: f"{d.day} {MONTHS[d.month - 1]} {d.year}",
    lambda d: f"{MONTHS[d.month - 1]} {d.day}, {d.year}",
    lambda d: f"the {ordinal(d.day)} of {MONTHS[d.month - 1]}, {d.year}",
    lambda d: f"{MONTHS[d.month - 1]} {ordinal(d.day)} {d.year}",
    lambda d: f"{d.day} {MONTHS[d.month - 1][:3]} {d.year}",
    lambda d: f"{MONTHS[d.month - 1][:3]} {d.day} {d.year}",
    lambda d: f"{d.day}-{MONTHS[d.month - 1][:3].upper()}-{d.year}",
    lambda d: f"{d.day}.{d.month}.{d.year}",
    lambda d: f"{d.day:02}.{d.month:02}.{d.year}",
    lambda d: f"{d.year}/{d.month:02}/{d.day:02}",
    lambda d: f"{d.year}{d.month:02}{d.day:02}",
    lambda d: f"{d.year}, {MONTHS[d.month - 1]} {d.day}",
)


def build(sizes: Mapping[str, int], seed: int) -> dict[str, list[Example]]:
    """All splits: days drawn without repetition, each in a spelling that is drawn as well."""
    days = [FIRST + timedelta(days=number) for number in range(DAYS)]
    splits = {}
    for split, size in sizes.items():
        rng, own = random.Random(f"{seed}/{split}"), [day for day in days if split_of(day.isoformat()) == split]
        if len(own) < size:
            raise SystemExit(f"error: there are only {len(own)} {split} days, {size} were asked for")
        chosen = rng.sample(own, size)
        splits[split] = [Example(f"date: {rng.choice(SPELLINGS)(day)}", day.isoformat()) for day in chosen]
    return splits


def main(argv: Sequence[str] | None = None) -> None:
    make(build, "Dates to ISO 8601, as chat records.", argv, train=6000, validation=300, test=500)


if __name__ == "__main__":
    main()

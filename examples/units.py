"""Lengths, weights, volumes and times in another unit: a task of arithmetic.

    convert: 3.4 km to m
    3400 m

An amount with its unit is in one split only, whichever unit it is converted to.

    python -m examples.units --out DIR [--seed 0] [--train 12000] [--validation 300] [--test 500]
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from decimal import Decimal

from examples.task_files import Example, make, split_of

# How many of the smallest unit each is.
UNITS: tuple[dict[str, int], ...] = (
    {"mm": 1, "cm": 10, "m": 1000, "km": 1_000_000},
    {"mg": 1, "g": 1000, "kg": 1_000_000},
    {"ml": 1, "cl": 10, "l": 1000},
    {"s": 1, "min": 60, "h": 3600},
)
MOST = 10**8  # of the smallest unit: longer answers are rows of zeros


def draw(rng: random.Random) -> tuple[str, str, str]:
    """An amount with its unit, the unit asked for, and the answer, which has three decimals at most."""
    while True:
        family = rng.choice(UNITS)
        given, wanted = rng.sample(list(family), 2)
        digits = rng.choice((1, 2, 2, 3))
        value = Decimal(rng.randint(1, 10**digits - 1)).scaleb(-rng.choice((0, 0, 1, 2)))
        answer = value * family[given] / family[wanted]
        if value * family[given] <= MOST and answer == answer.quantize(Decimal("0.001")) and answer:
            return f"{plain(value)} {given}", wanted, f"{plain(answer)} {wanted}"


def plain(value: Decimal) -> str:
    """Digits without an exponent and without zeros at the end."""
    text = f"{value:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def build(sizes: Mapping[str, int], seed: int) -> dict[str, list[Example]]:
    """All splits, each without repetition."""
    splits = {}
    for split, size in sizes.items():
        rng, found = random.Random(f"{seed}/{split}"), {}
        for _ in range(200 * size):
            amount, wanted, answer = draw(rng)
            if split_of(amount) == split:
                found[f"convert: {amount} to {wanted}"] = answer
            if len(found) == size:
                break
        else:
            raise SystemExit(f"error: there are too few {split} amounts for {size} records")
        splits[split] = [Example(user, answer) for user, answer in found.items()]
    return splits


def main(argv: Sequence[str] | None = None) -> None:
    make(build, "Amounts in another unit, as chat records.", argv, train=12000, validation=300, test=500)


if __name__ == "__main__":
    main()

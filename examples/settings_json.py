"""Settings files to JSON: sections become objects.

    settings to JSON
    unit = meter
    [motor]
    speed = 12

    {"unit": "meter", "motor": {"speed": "12"}}

Half of the files have no section: what a model that was taught to write flat JSON can do, the others it cannot. A file
is in one split only.

    python -m examples.settings_json --out DIR [--seed 0] [--train 6000] [--validation 300] [--test 500]
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence

from examples.task_files import Example, make, split_of

SECTIONS = "motor sensor network display storage battery camera heater pump filter printer server client log".split()
KEYS = (
    "speed level mode host port path limit unit color width height delay rate gain offset retry timeout volume "
    "channel address format size count depth angle"
).split()
WORDS = (
    "auto manual fast slow high low meter inch red green blue north south left right local remote plain quiet loud "
    "fixed free open closed"
).split()


def pairs(rng: random.Random, most: int) -> dict[str, str]:
    keys = rng.sample(KEYS, rng.randint(1, most))
    return {key: rng.choice(WORDS) if rng.random() < 0.5 else str(rng.randint(0, 999)) for key in keys}


def draw(rng: random.Random) -> Example:
    """A file as a prompt, and its JSON."""
    if rng.random() < 0.5:
        found: dict[str, object] = {**pairs(rng, 4)}
    else:
        found = {**(pairs(rng, 2) if rng.random() < 0.3 else {})}
        found |= {name: pairs(rng, 3) for name in rng.sample(SECTIONS, rng.randint(1, 2))}
    lines = []
    for name, value in found.items():
        lines += [f"[{name}]", *(f"{k} = {v}" for k, v in value.items())] if isinstance(value, dict) else [
            f"{name} = {value}"
        ]  # fmt: skip
    return Example("\n".join(["settings to JSON", *lines]), json.dumps(found))


def build(sizes: Mapping[str, int], seed: int) -> dict[str, list[Example]]:
    """All splits, each without repetition."""
    splits = {}
    for split, size in sizes.items():
        rng, found = random.Random(f"{seed}/{split}"), {}
        while len(found) < size:
            example = draw(rng)
            if split_of(example.user) == split:
                found[example.user] = example
        splits[split] = list(found.values())
    return splits


def main(argv: Sequence[str] | None = None) -> None:
    make(build, "Settings files to JSON, as chat records.", argv, train=6000, validation=300, test=500)


if __name__ == "__main__":
    main()

"""Home Assistant commands to JSON: a text-to-structure task made from the public intent grammar.

The grammar (PyPI `home-assistant-intents`, English) is a set of sentence templates per intent, such as
`<turn> on [<the>] {name} <in> [<the>] {area}`. Each is expanded here at random into commands, and the
answer is the intent with its slots:

    switch on my oak lantern in the den
    {"intent": "HassTurnOn", "slots": {"area": "den", "name": "oak lantern"}}

The splits are disjoint by template, so the test asks for wordings that training never showed. Half of
the names in the test are new as well. Every record is read back by Home Assistant's own recogniser and
kept only where that gives the same answer, which also drops every sentence with two meanings.

    python -m examples.home_assistant --out DIR [--seed 0] [--train 12000] [--validation 300] [--test 500]
"""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from examples.home_grammar import Expander, Recogniser, Template, answer_json, load_intents, read_templates
from examples.home_names import Home
from examples.task_files import Example, task_parser, write_splits

MAX_COMMAND = 120
HELD_OUT = 0.1  # of an intent's templates, for validation and for test each
ATTEMPTS = 12  # fruitless expansions in a row after which a template is spent


def split_templates(templates: Sequence[Template], seed: int) -> dict[str, list[Template]]:
    """About 80/10/10 of each intent, with one template of every group kept for train.

    So whatever a held-out template means, train says in other words; a group of one can't be held out.
    """
    rng = random.Random(f"{seed}/split")
    splits: dict[str, list[Template]] = {"train": [], "validation": [], "test": []}
    for intent in dict.fromkeys(template.intent for template in templates):
        own = [template for template in templates if template.intent == intent]
        rng.shuffle(own)
        anchors = {template.group: template for template in own}.values()
        free = [template for template in own if template not in anchors]
        held = max(1, round(HELD_OUT * len(own)))
        splits["test"] += free[:held]
        splits["validation"] += free[held : 2 * held]
        splits["train"] += [*anchors, *free[2 * held :]]
    for members in splits.values():
        rng.shuffle(members)  # a split smaller than its templates then still has all kinds of intents
    return splits


@dataclass
class Draws:
    """The examples of one split, the template of each, and what was lost on the way."""

    examples: list[Example]
    templates: list[Template]
    wordings: set[str]  # every command and every skeleton
    lost: Counter


def draw_split(
    split: str,
    templates: Sequence[Template],
    size: int,
    taken: set[str],
    expander: Expander,
    reader: Recogniser,
    seed: int,
) -> Draws:
    """Draw commands in turn from each template, since some expand to two commands and some to millions.

    `taken` holds the wordings of the other splits: two templates can meet in one skeleton, and a
    command with it would test the recall of a template, not its paraphrase.
    """
    draws = Draws([], [], set(), Counter())
    live = [(template, random.Random(f"{seed}/{split}/{template.intent}/{template.text}")) for template in templates]
    while live:
        spent = set()
        for template, rng in live:
            if len(draws.examples) == size:
                return draws
            for _ in range(ATTEMPTS):
                try:
                    command, skeleton, slots = expander.expand(template, split, rng)
                except LookupError:
                    draws.lost["not expandable"] += 1
                    continue
                answer = answer_json(template.intent, slots)
                if len(command) >= MAX_COMMAND:
                    draws.lost["too long"] += 1
                elif command in draws.wordings:
                    draws.lost["repeated"] += 1
                elif command in taken or skeleton in taken:
                    draws.lost["worded as in another split"] += 1
                elif reader.answer(command) != answer:
                    draws.lost["ambiguous"] += 1
                else:
                    draws.wordings |= {command, skeleton}
                    draws.examples.append(Example(command, answer))
                    draws.templates.append(template)
                    break
            else:
                spent.add(template)
        live = [pair for pair in live if pair[0] not in spent]
    raise SystemExit(f"error: the grammar gives only {len(draws.examples)} {split} records, {size} were asked for")


def build(sizes: dict[str, int], seed: int) -> tuple[dict[str, Draws], dict[str, list[Template]], Counter]:
    """All splits, the templates each was given, and how many test templates were left out and why."""
    intents = load_intents()
    home = Home(seed)
    expander, reader = Expander(intents, home), Recogniser(intents, home)
    given = split_templates(read_templates(intents), seed)
    draws: dict[str, Draws] = {}
    taken: set[str] = set()
    dropped: Counter = Counter()
    for split, templates in given.items():
        if split != "train":  # a small train split may miss what its templates could have shown
            taught = {template.group for template in draws["train"].templates}
            dropped[split] = sum(template.group not in taught for template in templates)
            templates = given[split] = [template for template in templates if template.group in taught]
        draws[split] = draw_split(split, templates, sizes[split], taken, expander, reader, seed)
        taken |= draws[split].wordings
    return draws, given, dropped


def main(argv: Sequence[str] | None = None) -> None:
    parser = task_parser("Home Assistant commands to JSON, as chat records.", train=12000, validation=300, test=500)
    args = parser.parse_args(argv)
    sizes = {"train": args.train, "validation": args.validation, "test": args.test}
    draws, given, dropped = build(sizes, args.seed)
    write_splits(args.out, {split: random_order(draw.examples, args.seed) for split, draw in draws.items()})

    print(f"{'intent':30} " + " ".join(f"{split + ' templates':>20} {'records':>8}" for split in sizes))
    used = {split: Counter(t.intent for t in set(draw.templates)) for split, draw in draws.items()}
    records = {split: Counter(t.intent for t in draw.templates) for split, draw in draws.items()}
    for intent in [*sorted(records["train"]), "all"]:
        if intent == "all":
            cells = [(sum(used[split].values()), sum(records[split].values())) for split in sizes]
        else:
            cells = [(used[split][intent], records[split][intent]) for split in sizes]
        print(f"{intent:30} " + " ".join(f"{count:20} {size:8}" for count, size in cells))
    for split, draw in draws.items():
        idle = len(given[split]) - sum(used[split].values())
        lost = ", ".join(f"{count} {why}" for why, count in draw.lost.most_common()) or "none"
        print(f"{split}: {dropped[split]} templates left out (train has none like them), {idle} gave nothing;")
        print(f"    expansions thrown away: {lost}")


def random_order(examples: Sequence[Example], seed: int) -> list[Example]:
    """Shuffled, so that any prefix of a file is a fair sample of it."""
    return random.Random(f"{seed}/order").sample(examples, len(examples))


if __name__ == "__main__":
    main()

"""Which experts the tasks use: how few get most rows, how far tasks agree, and how much text the choice needs.

After the analyses of the paper (arXiv 2407.01906), on the small model.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from itertools import combinations, islice
from pathlib import Path

import esft
from benchmarks.methods import tasks
from benchmarks.methods.rules import paper
from esft.checkpoint.load import load_tokenizer
from esft.data.batches import windows
from esft.data.cache import encoded
from esft.data.encoding import Encoder
from esft.data.examples import Example
from esft.data.sources import DataSource
from esft.runs.report import table
from examples.compare import read_general
from examples.demo import MODEL, load
from examples.general import encode_general

ROW, ROWS = 512, 8  # tokens of a row, and rows of a batch
FEWEST = (1, 2, 4, 8, 16)  # experts of a layer, the most used ones
SAMPLES = (1, 4, 16, 64)  # rows of text that a choice is made from
DRAWS = 4  # choices from other text, of each size


def concentration(of_tasks: Mapping[str, esft.ExpertScores]) -> list[dict]:
    """A row a task: the share of a layer's rows that its most used experts get, a mean over layers, in percent."""
    rows = []
    for task, scores in of_tasks.items():
        ranked = [sorted(layer.values(), reverse=True) for layer in scores.token_scores.values()]
        shares = {f"{n}": f"{100 * statistics.mean(sum(layer[:n]) for layer in ranked):.0f}" for n in FEWEST}
        counts = [len(ids) for ids in paper(scores).experts.values()]
        rows.append({"task": task} | shares | {"chosen": f"{min(counts)} to {max(counts)}", "in all": sum(counts)})
    return rows


def overlap(one: esft.ExpertSelection, other: esft.ExpertSelection) -> float:
    """|A and B| / |A or B| of the experts of two selections: 1 where they are the same, 0 without a common one."""
    mine, theirs = ({(layer, e) for layer, ids in s.experts.items() for e in ids} for s in (one, other))
    return len(mine & theirs) / len(mine | theirs)


def overlaps(selections: Mapping[str, esft.ExpertSelection]) -> list[dict]:
    return [
        {"task": task} | {name: f"{overlap(one, other):.2f}" for name, other in selections.items()}
        for task, one in selections.items()
    ]


def share_of_rows(selection: esft.ExpertSelection, scores: esft.ExpertScores) -> float:
    """The share of a text's rows that go to a selection's experts, a mean over layers."""
    return statistics.mean(
        sum(share for expert, share in layer.items() if expert in selection.experts.get(index, ()))
        for index, layer in scores.token_scores.items()
    )


def touched(
    selections: Mapping[str, esft.ExpertSelection],
    of_tasks: Mapping[str, esft.ExpertScores],
    of_parts: Mapping[str, esft.ExpertScores],
) -> list[dict]:
    """A row a task: the share of the rows of its own text, and of each part of the general data, that its experts get.

    What trains is what changes, so this is how far a training reaches into what the model should still know.
    """
    return [
        {"task": task, "its own": f"{100 * share_of_rows(selection, of_tasks[task]):.0f}"}
        | {part: f"{100 * share_of_rows(selection, scores):.0f}" for part, scores in of_parts.items()}
        for task, selection in selections.items()
    ]


def agreement(selections: Sequence[esft.ExpertSelection]) -> float:
    """The mean ``overlap`` of every two."""
    return statistics.mean(overlap(one, other) for one, other in combinations(selections, 2))


def scored(examples: Sequence[Example]) -> esft.ExpertScores:
    return esft.score_experts(load(MODEL), windows(examples, ROW, ROWS))


def stability(examples: Sequence[Example]) -> dict[str, str]:
    """How far choices agree that are made from as many rows of other text, by that number; end to end, none twice."""
    if (tokens := sum(len(each.ids) for each in examples)) < (needed := ROW * DRAWS * sum(SAMPLES)):
        raise ValueError(f"{tokens} tokens are too few: {needed} are needed")
    model, batches = load(MODEL), windows(examples, ROW, 1)
    return {
        f"{ROW * count:,}": f"{agreement([_chosen(model, list(islice(batches, count))) for _ in range(DRAWS)]):.2f}"
        for count in SAMPLES
    }


def _chosen(model, batches: list[dict]) -> esft.ExpertSelection:
    return paper(esft.score_experts(model, batches))


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks routing", description="which experts the tasks use")
    parser.add_argument("--out", type=Path, default=Path("build/methods"), help="of the tasks, as benchmarks methods")
    args = parser.parse_args(argv)
    folders = {task: tasks.files(task, args.out / "tasks", tasks.SIZES) for task in tasks.TASKS}
    of_tasks = {task: esft.ExpertScores.load(tasks.scores(folder)) for task, folder in folders.items()}
    tokenizer = load_tokenizer(str(MODEL))
    parts = encode_general(tokenizer, read_general(tasks.general(args.out)))
    of_parts = {part: scored(examples) for part, examples in parts.items()}
    selections = {task: paper(scores) for task, scores in of_tasks.items()}
    rows = [
        {"task": task} | stability(encoded(DataSource.of(folder / "train.jsonl"), Encoder(tokenizer, ROW)))
        for task, folder in folders.items()
    ]
    for title, found in (
        ("Percent of a layer's rows that its most used experts get, and how many are chosen", concentration(of_tasks)),
        ("Experts in common, of those that either task chooses", overlaps(selections)),
        ("Percent of the rows that go to a task's experts", touched(selections, of_tasks, of_parts)),
        (f"The same of {DRAWS} choices of a task, each from so many tokens of its own", rows),
    ):
        print(f"## {title}\n\n{table(found)}\n")

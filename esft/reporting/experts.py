"""What is said of a run's experts: how they were chosen, what they got of the data, and what other runs chose."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from esft.errors import InputError
from esft.scoring.expert_scores import RULES, ExpertScores, Scores
from esft.scoring.select import select_experts, shares
from esft.selection import ExpertSelection

MOST_CELLS = 20_000  # of a heatmap: with more, a page of megabytes is slow to open
LEVELS = 16  # of colour


@dataclass(frozen=True)
class Cell:
    """An expert in a heatmap: its score, its colour of ``LEVELS``, its place by falling score, whether it trains."""

    expert: int
    score: float
    level: int
    rank: int
    chosen: bool


@dataclass(frozen=True)
class LayerLoad:
    """What the chosen experts of a layer get of its rows.

    Attributes:
        chosen: their ids, best first.
        experts: that the layer has; None without scores.
        before: their share of the rows by the scores that were measured before, None without.
        after: the same by scores that were measured after.
        drift: share of the rows that went to other experts in between (total variation distance), None without both.
        gained: the expert whose share rose most, and by how much; None where nothing moved.
        lost: the one whose share fell most, and by how much.
    """

    layer: int
    chosen: list[int]
    experts: int | None
    before: float | None
    after: float | None
    drift: float | None
    gained: tuple[int, float] | None
    lost: tuple[int, float] | None


@dataclass(frozen=True)
class LayerOverlap:
    """Experts of a layer that two runs chose; ``chance``: as many would be in both if one had drawn its own blindly."""

    layer: int
    here: int
    there: int
    both: int
    chance: float | None


def check_scores(selection: ExpertSelection | None, scores: ExpertScores, path: object) -> None:
    """Raise InputError for scores of a model that has not all selected experts."""
    for layer, ids in (selection.experts if selection else {}).items():
        if layer not in scores.token_scores:
            raise InputError(f"{path}: scores of another model: has no layer {layer}")
        if strange := [e for e in ids if e not in scores.token_scores[layer]]:
            raise InputError(f"{path}: scores of another model: has no expert {strange[0]} of layer {layer}")


def check_alike(before: ExpertScores, after: ExpertScores, path: object) -> None:
    """Raise InputError naming the file of the second where the two are not of the same layers and experts."""
    for layer in sorted(before.token_scores.keys() | after.token_scores.keys()):
        if before.token_scores.get(layer, {}).keys() != after.token_scores.get(layer, {}).keys():
            raise InputError(f"{path}: scores of another model than those before: layer {layer} has other experts")


def heatmap(scores: Scores, selection: ExpertSelection | None) -> dict[int, list[Cell]]:
    """The experts of every layer by falling score; of many, as many of each layer as a page has room for."""
    chosen = selection.experts if selection else {}
    most = max((score for layer in scores.values() for score in layer.values()), default=0) or 1.0
    room = max(1, MOST_CELLS // max(1, len(scores)))
    return {
        layer: [
            Cell(expert, score, min(int(score / most * LEVELS), LEVELS - 1), rank, expert in chosen.get(layer, []))
            for rank, (expert, score) in enumerate(_ranked(by_expert)[:room], 1)
        ]
        for layer, by_expert in scores.items()
    }


def loads(selection: ExpertSelection, before: ExpertScores | None, after: ExpertScores | None) -> list[LayerLoad]:
    """Of every layer in which experts are selected."""
    return [
        _load(layer, ids, *(each and each.token_scores[layer] for each in (before, after)))
        for layer, ids in selection.experts.items()
    ]


def _load(layer: int, ids: list[int], before: dict[int, float] | None, after: dict[int, float] | None) -> LayerLoad:
    def on_chosen(scores: dict[int, float] | None) -> float | None:
        return None if scores is None else sum(scores[expert] for expert in ids)

    drift = gained = lost = None
    if before is not None and after is not None:
        changes = {expert: after[expert] - score for expert, score in before.items()}
        drift = sum(map(abs, changes.values())) / 2
        gained, lost = (
            (best(changes.items(), key=lambda item: item[1]) for best in (max, min)) if drift else (None, None)
        )
    known = before if before is not None else after
    count = None if known is None else len(known)
    return LayerLoad(layer, ids, count, on_chosen(before), on_chosen(after), drift, gained, lost)


def explained(selection: ExpertSelection, scores: ExpertScores) -> list[str]:
    """The options of ``esft select`` that give exactly these experts, in this order, from these scores; each is tried.

    Of a share to reach, all that do are told: those above one number and up to another.
    """
    if not selection.num_experts:
        return []
    rules = [rule for rule in RULES if getattr(scores, f"{rule}_scores").keys() == scores.token_scores.keys()]
    return [option for rule in rules for option in _explained(selection, scores, rule)]


def _explained(selection: ExpertSelection, scores: ExpertScores, rule: str) -> Iterator[str]:
    by_layer = scores.by(rule)
    first = min(selection.experts) if min(selection.experts) > min(by_layer) else 0
    words = f"--by {rule}{f' --layers {first}:' if first else ''}"
    if (found := _top_p(selection, by_layer if rule in ("token", "gate") else shares(by_layer))) is not None:
        above, most = found
        if _gives(selection, scores, rule, top_p=most, first_layer=first):
            yield f"{words} --top-p P, for P above {above:.4g} and up to {most:.4g}"
    count = len(next(iter(selection.experts.values())))
    if count and _gives(selection, scores, rule, experts_per_layer=count, first_layer=first):
        yield f"{words} --experts-per-layer {count}"
    if _gives(selection, scores, rule, budget=selection.num_experts, first_layer=first):
        yield f"{words} --budget {selection.num_experts}"


def _top_p(selection: ExpertSelection, by_layer: Scores) -> tuple[float, float] | None:
    """What a share has to be above and may be at most for as many experts to reach it; None where there is no such."""
    # Summed one by one, as the rule does it: ``sum`` rounds otherwise.
    sums = [[0.0, *accumulate(by_layer[layer][e] for e in ids)] for layer, ids in selection.experts.items()]
    if not all(len(each) > 1 for each in sums):
        return None
    above, most = max(each[-2] for each in sums), min(1.0, *(each[-1] for each in sums))
    return (above, most) if above < most else None


def _gives(selection: ExpertSelection, scores: ExpertScores, rule: str, **how: Any) -> bool:
    try:
        return select_experts(scores, rule, **how).experts == selection.experts
    except InputError:  # no such number of experts
        return False


def overlap(here: ExpertSelection, there: ExpertSelection, scores: ExpertScores | None = None) -> list[LayerOverlap]:
    """Layer by layer, of all layers in which either has experts.

    Args:
        scores: of the model, for how many experts a layer has.
    """
    found = []
    for layer in sorted(here.experts.keys() | there.experts.keys()):
        mine, theirs = set(here.experts.get(layer, [])), set(there.experts.get(layer, []))
        count = len(scores.token_scores.get(layer, {})) if scores else 0
        chance = len(mine) * len(theirs) / count if count else None
        found.append(LayerOverlap(layer, len(mine), len(theirs), len(mine & theirs), chance))
    return found


def _ranked(by_expert: dict[int, float]) -> list[tuple[int, float]]:
    return sorted(by_expert.items(), key=lambda item: (-item[1], item[0]))

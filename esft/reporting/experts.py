"""What is said of a run's experts: how they were chosen, what they got of the data, and what other runs chose."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from esft.errors import InputError
from esft.scoring.expert_scores import ExpertScores, Scores
from esft.scoring.select import select_experts
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
        if strange := [e for e in ids if e not in scores.token_scores.get(layer, {})]:
            raise InputError(f"{path}: scores of another model: has no expert {strange[0]} of layer {layer}")


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
        changes = {expert: after.get(expert, 0.0) - score for expert, score in before.items()}
        drift = sum(map(abs, changes.values())) / 2
        gained, lost = (
            (best(changes.items(), key=lambda item: item[1]) for best in (max, min)) if drift else (None, None)
        )
    known = before if before is not None else after
    count = None if known is None else len(known)
    return LayerLoad(layer, ids, count, on_chosen(before), on_chosen(after), drift, gained, lost)


def top_p_of(
    selection: ExpertSelection, scores: ExpertScores, by: Literal["token", "gate"]
) -> tuple[float, float] | None:
    """The numbers that ``top_p`` has to be above and may be at most for the paper's rule to choose just these experts.

    None where no number does.
    """
    per_layer = scores.token_scores if by == "token" else scores.gate_scores
    if not per_layer or selection.experts.keys() != per_layer.keys() or not all(selection.experts.values()):
        return None
    # Summed one by one, as the rule does it: ``sum`` rounds otherwise.
    sums = [[0.0, *accumulate(per_layer[layer][e] for e in ids)] for layer, ids in selection.experts.items()]
    most = min(1.0, *(each[-1] for each in sums))
    if not most or select_experts(scores, by, most).experts != selection.experts:
        return None
    return max(each[-2] for each in sums), most


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

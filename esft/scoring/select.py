"""Choosing the experts to train from their scores: by which scores, and how many."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from esft.errors import InputError
from esft.scoring.expert_scores import ExpertScores, Scores
from esft.selection import ExpertSelection

# Scores are published with four decimals: sums of a layer miss 1 by about this much.
ROUNDING = 1e-2


def select_experts(
    scores: ExpertScores,
    by: str = "token",
    top_p: float = 0.2,
    *,
    experts_per_layer: int | None = None,
    budget: int | float | None = None,
    like: ExpertSelection | None = None,
    against: ExpertScores | None = None,
    weight: float = 1.0,
    first_layer: int = 0,
) -> ExpertSelection:
    """The experts with the highest scores; ties go to the lower layer, then to the lower expert id.

    How many is said by one of the following; without, it is the paper's ``top_p`` (section 3.3).

    Args:
        scores: of the task.
        by: which of them, one of ``RULES``.
        top_p: in each layer, until the scores sum to this: token and gate scores as they are, the others as shares of
            the layer's sum. Not looked at where one of the next three is given.
        experts_per_layer: so many in each layer.
        budget: so many over all layers, a whole number; or as a float in (0, 1] this share of all scored experts. The
            layers' scores are compared as they are.
        like: as many in each layer as this selection has, for comparisons at equal parameters.
        against: scores of general text: the order is by an expert's share of its layer on the task, less ``weight``
            times its share on general text. ``top_p`` still counts the task's scores. Experts that the task does not
            use come last.
        weight: of general text, 0 or more.
        first_layer: only layers from this number on. The backward of a training stops at the lowest of them.

    Raises InputError for a number out of its range, more experts than there are, scores that are missing, of another
    model (``against``, ``like``), or that do not sum to ``top_p`` (gate scores sum to less than 1).
    """
    _check_numbers(top_p, experts_per_layer, budget, weight)
    given = scores.by(by)
    values = {layer: experts for layer, experts in given.items() if layer >= first_layer}
    if not values:
        raise InputError(f"no layer from {first_layer} on has scores; the last one is layer {max(given)}")
    if against is not None and (more := against.by(by).keys() - given.keys()):
        raise InputError(f"the scores to select against are of another model: there is a layer {min(more)}")
    order = values if against is None else contrast(values, against.by(by), weight)
    ranked = {layer: _ranked(order[layer], values[layer]) for layer in values}
    how: dict[str, object] = {"by": by}
    if like is not None:
        how["like"] = counts = {layer: len(ids) for layer, ids in like.experts.items() if ids}
        experts = _counted(ranked, counts)
    elif experts_per_layer is not None:
        how["experts_per_layer"] = experts_per_layer
        experts = _counted(ranked, dict.fromkeys(ranked, experts_per_layer))
    elif budget is not None:
        how["budget"] = count = _count(budget, given)
        experts = _over_all_layers(order, values, count)
    else:
        how["top_p"] = top_p
        sums = values if by in ("token", "gate") else shares(values)
        experts = {layer: _until(ranked[layer], sums[layer], top_p, f"layer {layer}: {by}") for layer in ranked}
    how |= {"against": weight} if against is not None else {}
    how |= {"first_layer": first_layer} if first_layer else {}
    return ExpertSelection(experts, chosen_by=how)


def shares(scores: Scores) -> Scores:
    """Scores over their layer's sum; zeros where that is zero."""
    totals = {layer: math.fsum(experts.values()) or 1.0 for layer, experts in scores.items()}
    return {layer: {e: s / totals[layer] for e, s in experts.items()} for layer, experts in scores.items()}


def contrast(task: Scores, general: Scores, weight: float) -> Scores:
    """Every expert's share of its layer on the task, less ``weight`` times its share on general text.

    Raises InputError where general text was scored with other layers or experts.
    """
    for layer, experts in task.items():
        if general.get(layer, {}).keys() != experts.keys():
            raise InputError(f"the scores to select against are of another model: layer {layer} has other experts")
    of_task, of_general = shares(task), shares({layer: general[layer] for layer in task})
    return {
        layer: {e: share - weight * of_general[layer][e] for e, share in experts.items()}
        for layer, experts in of_task.items()
    }


def _ranked(order: Mapping[int, float], values: Mapping[int, float]) -> list[int]:
    """A layer's experts, best first; those without any score last."""
    return sorted(order, key=lambda e: (values[e] == 0, -order[e], e))


def _until(ranked: Sequence[int], values: Mapping[int, float], top_p: float, what: str) -> list[int]:
    """The first experts whose scores sum to ``top_p``."""
    if (total := sum(values.values())) < top_p - ROUNDING:
        raise InputError(f"{what} scores sum to {total:.3f}, below top_p {top_p}")
    chosen, reached = [], 0.0
    for expert in ranked:
        if reached >= top_p:
            break
        chosen.append(expert)
        reached += values[expert]
    return chosen


def _counted(ranked: Mapping[int, list[int]], counts: Mapping[int, int]) -> dict[int, list[int]]:
    """The first so many of each layer."""
    for layer, count in counts.items():
        if layer not in ranked:
            raise InputError(f"layer {layer} is to have {count} experts, and has no scores to choose them by")
        if count > len(ranked[layer]):
            raise InputError(f"layer {layer} is to have {count} experts; it has {len(ranked[layer])}")
    return {layer: experts[: counts.get(layer, 0)] for layer, experts in ranked.items()}


def _count(budget: int | float, scores: Scores) -> int:
    """A budget as a number of experts, at least one."""
    total = sum(map(len, scores.values()))
    return budget if isinstance(budget, int) else max(1, round(budget * total))


def _over_all_layers(order: Scores, values: Scores, count: int) -> dict[int, list[int]]:
    """The so many best of all layers, each layer's best first."""
    places = [
        (values[layer][e] == 0, -score, layer, e) for layer, experts in order.items() for e, score in experts.items()
    ]
    if count > len(places):
        raise InputError(f"a budget of {count} experts: the layers have {len(places)}")
    experts: dict[int, list[int]] = {layer: [] for layer in order}
    for _, _, layer, expert in sorted(places)[:count]:
        experts[layer].append(expert)
    return experts


def _check_numbers(top_p: float, per_layer: int | None, budget: int | float | None, weight: float) -> None:
    if not 0 < top_p <= 1:
        raise InputError(f"top_p must be in (0, 1], got {top_p}")
    if per_layer is not None and per_layer < 1:
        raise InputError(f"experts_per_layer must be at least 1, got {per_layer}")
    if isinstance(budget, int) and budget < 1:
        raise InputError(f"a budget of experts must be at least 1, got {budget}")
    if isinstance(budget, float) and not 0 < budget <= 1:
        raise InputError(f"a budget as a share of all experts must be in (0, 1], got {budget}")
    if not 0 <= weight < math.inf:
        raise InputError(f"weight must be a number of at least 0, got {weight}")

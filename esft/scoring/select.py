"""Choosing the experts to train from their scores."""

from __future__ import annotations

from typing import Literal

from esft.errors import InputError
from esft.scoring.expert_scores import ExpertScores
from esft.selection import ExpertSelection

# Scores are published with four decimals: sums of a layer miss 1 by about this much.
ROUNDING = 1e-2


def select_experts(scores: ExpertScores, by: Literal["token", "gate"] = "token", top_p: float = 0.2) -> ExpertSelection:
    """Per layer, the highest-scored experts until their scores sum to ``top_p`` (paper, section 3.3).

    Ties go to the lower expert id. Raises InputError for a ``top_p`` outside (0, 1], for an unknown ``by``, and for a
    layer whose scores do not sum to ``top_p`` (gate scores sum to less than 1).
    """
    if not 0 < top_p <= 1:
        raise InputError(f"top_p must be in (0, 1], got {top_p}")
    if by not in ("token", "gate"):
        raise InputError(f"by must be 'token' or 'gate', got {by!r}")
    per_layer = scores.token_scores if by == "token" else scores.gate_scores
    if not per_layer:
        raise InputError(f"there are no {by} scores to select by")
    if missing := scores.token_scores.keys() - per_layer.keys():
        raise InputError(f"layer {min(missing)} has no {by} scores to select by")
    experts = {}
    for layer, by_expert in per_layer.items():
        total = sum(by_expert.values())
        if total < top_p - ROUNDING:
            raise InputError(f"layer {layer}: {by} scores sum to {total:.3f}, below top_p {top_p}")
        chosen, reached = [], 0.0
        for expert, score in sorted(by_expert.items(), key=lambda item: (-item[1], item[0])):
            if reached >= top_p:
                break
            chosen.append(expert)
            reached += score
        experts[layer] = chosen
    return ExpertSelection(experts, chosen_by={"by": by, "top_p": top_p})

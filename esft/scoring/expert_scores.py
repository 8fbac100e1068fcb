"""The scores of a model's experts, and their file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from esft.errors import InputError
from esft.storage.files import write_json
from esft.storage.limits import EXPERTS, LAYERS
from esft.storage.reading import check_keys, key_number, read_json, shown

Scores = dict[int, dict[int, float]]  # layer -> expert -> score
ROUNDING = 5e-5  # the published score files have four decimals

# What experts are scored by. Every published file has the first two; ``esft.scoring`` adds the others on demand.
RULES = ("token", "gate", "output", "fisher", "fisher_rows")

_PARTS = tuple(f"{rule}_scores" for rule in RULES)
_PUBLISHED = _PARTS[:2]
# Of a gate value, as some functions that make them have no upper end; of what has a unit of its own.
_MOST, _MOST_ADDED = 1e6, 1e30


@dataclass(frozen=True)
class ExpertScores:
    """Scores of every routed expert, the published ``summary.json`` and what else experts are chosen by.

    Attributes:
        token_scores: share of a layer's (token, slot) assignments that an expert got; a layer sums to 1.
        gate_scores: mean over tokens of the expert's gate value before any renormalisation or scaling, counted as 0
            where the expert is not among a token's top K; a layer sums to less than 1. Empty where the gate values
            cannot be told (see ``esft.scoring.routers.Choice``).
        output_scores: see ``esft.scoring.outputs``; a token's mean. Empty where they were not asked for, as the others.
        fisher_scores: see ``esft.scoring.gradients``; a batch's mean of the squared norm of the expert's gradient.
        fisher_rows_scores: the same with every row taken for itself.
    """

    token_scores: Scores
    gate_scores: Scores
    output_scores: Scores = field(default_factory=dict)
    fisher_scores: Scores = field(default_factory=dict)
    fisher_rows_scores: Scores = field(default_factory=dict)

    def by(self, rule: str) -> Scores:
        """Those of one rule. Raises InputError for none of ``RULES``, and where a layer has none."""
        if rule not in RULES:
            raise InputError(f"by must be one of {', '.join(map(repr, RULES))}, got {rule!r}")
        found: Scores = getattr(self, f"{rule}_scores")
        if not found:
            raise InputError(f"there are no {rule} scores to select by")
        if missing := self.token_scores.keys() - found.keys():
            raise InputError(f"layer {min(missing)} has no {rule} scores to select by")
        return found

    def save(self, path: str | Path) -> None:
        """Write the published layout, and beside it what else there is.

        Raises DiskError when the file cannot be written.
        """
        parts = {part: _to_json(getattr(self, part)) for part in _PARTS}
        write_json(path, {part: scores for part, scores in parts.items() if scores or part in _PUBLISHED})

    @classmethod
    def load(cls, path: str | Path) -> ExpertScores:
        """Layers and experts in ascending order.

        Raises InputError naming the file, for scores that are no shares of what a layer's experts get too.
        """
        raw = read_json(path)
        if not isinstance(raw, dict) or not raw.keys() >= set(_PUBLISHED):
            raise InputError(
                f'{path}: not a score file ({{"token_scores": {{layer: {{expert: score}}}}, "gate_scores": ...}})'
            )
        check_keys(raw, _PARTS, lambda key: InputError(f"{path}: does not have a part {key}"))
        found = {part: _from_json(raw[part], f"{path}: {part}", part) for part in _PARTS if part in raw}
        token = found["token_scores"]
        for layer, scores in token.items():
            # The published files have four decimals: each expert may miss its score by half of the last one.
            if abs((total := math.fsum(scores.values())) - 1) > 1e-6 + len(scores) * ROUNDING:
                raise InputError(f"{path}: token_scores of layer {layer} sum to {total:.4f}, not to 1")
        for part, layers in found.items():
            for layer, scores in layers.items():
                if token.get(layer, {}).keys() != scores.keys():
                    raise InputError(f"{path}: layer {layer} has {part} of other experts than token_scores")
        return cls(**found)

    def check(self, layers: Mapping[int, int]) -> None:
        """Raise InputError unless the scores are of a model with these layers (index -> number of experts)."""
        for scores in (getattr(self, part) or self.token_scores for part in _PARTS):
            scored = {layer: len(experts) for layer, experts in scores.items()}
            if scored != dict(layers):
                raise InputError(
                    f"score file is of another model: it has {_shape(scored)}, the model has {_shape(dict(layers))}"
                )
            for layer, experts in scores.items():
                if strange := set(experts) - set(range(layers[layer])):
                    raise InputError(f"score file is of another model: layer {layer} has no expert {min(strange)}")


def _shape(layers: dict[int, int]) -> str:
    return f"layers {min(layers)}-{max(layers)} with {sorted(set(layers.values()))} experts" if layers else "no layers"


def _to_json(scores: Scores) -> dict[str, dict[str, float]]:
    return {str(layer): {str(e): s for e, s in experts.items()} for layer, experts in scores.items()}


def _from_json(raw: Any, where: str, part: str) -> Scores:
    most = _MOST if part in _PUBLISHED else _MOST_ADDED
    if not isinstance(raw, dict):
        raise InputError(f"{where} must be {{layer: {{expert: score}}}}, got {shown(raw)}")
    layers: Scores = {}
    for key, scores in raw.items():
        if (layer := key_number(key, LAYERS)) is None:
            raise InputError(f"{where}: {shown(key)} is not a layer's number")
        if not isinstance(scores, dict) or not scores:
            raise InputError(f"{where}: layer {layer} must be {{expert: score}}, got {shown(scores)}")
        by_expert: dict[int, float] = {}
        for name, score in scores.items():
            if (expert := key_number(name, EXPERTS)) is None:
                raise InputError(f"{where}: layer {layer}: {shown(name)} is not an expert's number")
            if type(score) not in (int, float) or not 0 <= score <= most:
                raise InputError(
                    f"{where}: layer {layer}: expert {expert} has score {shown(score)}, not a finite share"
                )
            by_expert[expert] = float(score)
        if missing := sorted(set(range(max(by_expert) + 1)) - by_expert.keys()):
            raise InputError(
                f"{where}: layer {layer} has no score of expert {missing[0]}, but of expert {max(by_expert)}"
            )
        layers[layer] = dict(sorted(by_expert.items()))
    return dict(sorted(layers.items()))

"""The scores of a model's experts, and their file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esft.errors import InputError
from esft.storage.files import write_json
from esft.storage.limits import EXPERTS, LAYERS
from esft.storage.reading import check_keys, key_number, read_json, shown

Scores = dict[int, dict[int, float]]  # layer -> expert -> score
ROUNDING = 5e-5  # the published score files have four decimals

_PARTS = ("token_scores", "gate_scores")
_MOST = 1e6  # of a gate value: some functions that make them have no upper end


@dataclass(frozen=True)
class ExpertScores:
    """Scores of every routed expert, the published ``summary.json``.

    Attributes:
        token_scores: share of a layer's (token, slot) assignments that an expert got; a layer sums to 1.
        gate_scores: mean over tokens of the expert's gate value before any renormalisation or scaling, counted as 0
            where the expert is not among a token's top K; a layer sums to less than 1. Empty where the gate values
            cannot be told (see ``esft.scoring.routers.Choice``).
    """

    token_scores: Scores
    gate_scores: Scores

    def save(self, path: str | Path) -> None:
        """Write the published layout; raises DiskError when the file cannot be written."""
        write_json(path, {"token_scores": _to_json(self.token_scores), "gate_scores": _to_json(self.gate_scores)})

    @classmethod
    def load(cls, path: str | Path) -> ExpertScores:
        """Layers and experts in ascending order.

        Raises InputError naming the file, for scores that are no shares of what a layer's experts get too.
        """
        raw = read_json(path)
        if not isinstance(raw, dict) or not raw.keys() >= set(_PARTS):
            raise InputError(
                f'{path}: not a score file ({{"token_scores": {{layer: {{expert: score}}}}, "gate_scores": ...}})'
            )
        check_keys(raw, _PARTS, lambda key: InputError(f"{path}: does not have a part {key}"))
        token, gate = (_from_json(raw[part], f"{path}: {part}") for part in _PARTS)
        for layer, scores in token.items():
            # The published files have four decimals: each expert may miss its score by half of the last one.
            if abs((total := math.fsum(scores.values())) - 1) > 1e-6 + len(scores) * ROUNDING:
                raise InputError(f"{path}: token_scores of layer {layer} sum to {total:.4f}, not to 1")
        for layer, scores in gate.items():
            if token.get(layer, {}).keys() != scores.keys():
                raise InputError(f"{path}: layer {layer} has gate_scores of other experts than token_scores")
        return cls(token, gate)

    def check(self, layers: Mapping[int, int]) -> None:
        """Raise InputError unless the scores are of a model with these layers (index -> number of experts)."""
        for scores in (self.token_scores, self.gate_scores or self.token_scores):
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


def _from_json(raw: Any, where: str) -> Scores:
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
            if type(score) not in (int, float) or not 0 <= score <= _MOST:
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

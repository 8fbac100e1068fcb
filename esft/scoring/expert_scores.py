"""The scores of a model's experts, and their file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from esft.errors import InputError
from esft.files import read_json, write_json

Scores = dict[int, dict[int, float]]  # layer -> expert -> score


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
        """Layers and experts in ascending order. Raises InputError naming the file."""
        raw = read_json(path)
        try:
            scores = cls(_from_json(raw["token_scores"]), _from_json(raw["gate_scores"]))
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
            raise InputError(
                f'{path}: not a score file ({{"token_scores": {{layer: {{expert: score}}}}, "gate_scores": ...}})'
            ) from error
        for layer, experts in (*scores.token_scores.items(), *scores.gate_scores.items()):
            for expert, score in experts.items():
                if not 0 <= score < math.inf:
                    raise InputError(f"{path}: layer {layer}: expert {expert} has score {score}, not a finite share")
        return scores

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


def _from_json(raw: dict[str, dict[str, float]]) -> Scores:
    layers = {int(layer): {int(e): float(s) for e, s in experts.items()} for layer, experts in raw.items()}
    return {layer: dict(sorted(layers[layer].items())) for layer in sorted(layers)}

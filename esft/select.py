"""Choosing the experts to train from their scores."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from esft.errors import InputError
from esft.files import read_json, write_json
from esft.score import ExpertScores

# Scores are published with four decimals: sums of a layer miss 1 by about this much.
ROUNDING = 1e-2


@dataclass(frozen=True)
class ExpertSelection:
    """Which parts of a model train, the published ``expert_cfg.json``.

    Attributes:
        experts: layer index -> ids of the routed experts to train, best first.
        shared_experts: whether the shared experts of those layers train too.
        non_expert_modules: whether everything that is not an expert (attention, norms, embeddings, router) trains.
    """

    experts: dict[int, list[int]]
    shared_experts: bool = False
    non_expert_modules: bool = False
    chosen_by: dict[str, Any] = field(default_factory=dict, compare=False)  # not saved: goes to the adapter's manifest

    def save(self, path: str | Path) -> None:
        write_json(
            path,
            {
                "experts": {str(layer): ids for layer, ids in self.experts.items()},
                "shared_experts": self.shared_experts,
                "non_expert_modules": self.non_expert_modules,
            },
        )

    @classmethod
    def load(cls, path: str | Path) -> ExpertSelection:
        """Raises InputError naming the file and what is wrong in it."""
        raw = read_json(path)
        try:
            experts = {int(layer): [int(e) for e in ids] for layer, ids in raw["experts"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f'{path}: not an expert selection ({{"experts": {{layer: [ids]}}}})') from error
        for layer, ids in experts.items():
            if len(set(ids)) != len(ids):
                raise InputError(f"{path}: layer {layer} names an expert twice: {ids}")
        return cls(experts, bool(raw.get("shared_experts")), bool(raw.get("non_expert_modules")))

    def check(self, layers: dict[int, int]) -> None:
        """Raise InputError unless every layer and expert exists; ``layers`` maps layer index -> number of experts."""
        for layer, ids in self.experts.items():
            if layer not in layers:
                raise InputError(f"selection names layer {layer}; the model's MoE layers are {sorted(layers)}")
            if len(set(ids)) != len(ids):
                raise InputError(f"selection names an expert of layer {layer} twice: {ids}")
            if bad := [e for e in ids if not 0 <= e < layers[layer]]:
                raise InputError(f"selection names experts {bad} of layer {layer}, which has {layers[layer]} experts")

    @property
    def num_experts(self) -> int:
        return sum(len(ids) for ids in self.experts.values())

    def __str__(self) -> str:
        return json.dumps({str(layer): ids for layer, ids in self.experts.items()})


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

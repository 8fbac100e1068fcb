"""Which parts of a model train: the word that all stages share."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from esft.errors import InputError
from esft.storage.files import write_json
from esft.storage.limits import EXPERTS, LAYERS
from esft.storage.reading import check_keys, key_number, read_json, shown

_FLAGS = ("shared_experts", "non_expert_modules")


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
        """Write the published layout; raises DiskError when the file cannot be written."""
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
        if not isinstance(raw, dict) or not isinstance(raw.get("experts"), dict):
            raise InputError(f'{path}: not an expert selection ({{"experts": {{layer: [ids]}}}})')
        check_keys(raw, ("experts", *_FLAGS), lambda key: InputError(f"{path}: does not have a part {key}"))
        experts: dict[int, list[int]] = {}
        for key, ids in raw["experts"].items():
            if (layer := key_number(key, LAYERS)) is None:
                raise InputError(f"{path}: {shown(key)} is not a layer's number")
            if not isinstance(ids, list) or not all(type(e) is int for e in ids):
                raise InputError(
                    f"{path}: the experts of layer {layer} must be a list of whole numbers, got {shown(ids)}"
                )
            if strange := [e for e in ids if not 0 <= e < EXPERTS]:
                raise InputError(f"{path}: layer {layer} names an expert {shown(strange[0])}")
            if len(set(ids)) != len(ids):
                raise InputError(f"{path}: layer {layer} names an expert twice: {shown(ids)}")
            experts[layer] = ids
        flags = {name: raw.get(name, False) for name in _FLAGS}
        for name, value in flags.items():
            if not isinstance(value, bool):
                raise InputError(f"{path}: {name} must be true or false, got {shown(value)}")
        return cls(experts, **flags)

    def check(self, layers: dict[int, int], shared_experts: bool) -> None:
        """Raise InputError unless what is selected exists.

        Args:
            layers: the model's, layer index -> number of experts.
            shared_experts: whether the model has any.
        """
        if self.shared_experts and not shared_experts:
            raise InputError("selection names shared experts; the model has none")
        if not isinstance(self.experts, dict):
            raise InputError(f"a selection's experts must be {{layer: [ids]}}, got {self.experts!r}")
        for layer, ids in self.experts.items():
            # What only equals a whole number (5.0, True, a tensor) finds the expert, and then breaks the files.
            if type(layer) is not int:
                raise InputError(f"a selection's layers must be whole numbers, got {layer!r}")
            if not isinstance(ids, list | tuple) or not all(type(e) is int for e in ids):
                raise InputError(f"the selected experts of layer {layer} must be a list of whole numbers, got {ids!r}")
            if layer not in layers:
                raise InputError(f"selection names layer {layer}; the model's MoE layers are {sorted(layers)}")
            if len(set(ids)) != len(ids):
                raise InputError(f"selection names an expert of layer {layer} twice: {ids}")
            if bad := [e for e in ids if not 0 <= e < layers[layer]]:
                raise InputError(f"selection names experts {bad} of layer {layer}, which has {layers[layer]} experts")

    @property
    def is_empty(self) -> bool:
        """Whether nothing at all would train."""
        return not (self.num_experts or self.shared_experts or self.non_expert_modules)

    @property
    def num_experts(self) -> int:
        return sum(len(ids) for ids in self.experts.values())

    def __str__(self) -> str:
        return json.dumps({str(layer): ids for layer, ids in self.experts.items()})

"""Where a model keeps its experts, and what a model family calls things. Data, not branches."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.moe import _default_apply_gate

from esft.errors import InputError
from esft.moe import Experts


@dataclass(frozen=True)
class Family:
    """What one model family calls things.

    Attributes:
        scoring: what the router applies to its logits before the choice, "softmax" or "sigmoid".
        block: the checkpoint's name of the MoE block where the model says ``mlp``.
        projections: the checkpoint's names of an expert's gate, up and down projection.
    """

    scoring: str = "softmax"
    block: str = "mlp"
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")


FAMILIES = {
    "deepseek_v2": Family(),
    "deepseek_v3": Family(scoring="sigmoid"),
    "mixtral": Family(block="block_sparse_moe", projections=("w1", "w3", "w2")),
    "olmoe": Family(),
    "qwen2_moe": Family(),
    "qwen3_moe": Family(),
}

_LAYER = re.compile(r"\blayers\.(\d+)\b")


def family_of(model_type: str) -> Family:
    """Raises InputError for a family whose names and router are not known: a guess could go wrong without a sign."""
    if model_type not in FAMILIES:
        raise InputError(f"models of type {model_type!r} are not supported; supported are {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


@dataclass(frozen=True)
class MoELayer:
    """One MoE layer of a model: its index, the module path of its experts, and the modules themselves."""

    index: int
    name: str
    block: nn.Module  # holds experts, router and shared experts
    experts: nn.Module

    @property
    def attribute(self) -> str:
        return self.name.rpartition(".")[2]

    @property
    def num_experts(self) -> int:
        return int(self.experts.num_experts)

    @property
    def router(self) -> nn.Module:
        for name in ("gate", "router"):
            if isinstance(module := getattr(self.block, name, None), nn.Module):
                return module
        raise InputError(f"layer {self.index}: no router beside {self.name}")

    @property
    def shared_experts(self) -> list[nn.Module]:
        names = ("shared_experts", "shared_expert", "shared_expert_gate")
        return [m for name in names if isinstance(m := getattr(self.block, name, None), nn.Module)]


def moe_layers(model: nn.Module) -> list[MoELayer]:
    """All MoE layers in order of their index, of a stock or a swapped model.

    Raises InputError for a model without any.
    """
    modules = dict(model.named_modules())
    layers = []
    for name, module in modules.items():
        is_stock = hasattr(module, "gate_up_proj") and hasattr(module, "down_proj") and hasattr(module, "num_experts")
        found = _LAYER.search(name)
        if found and (is_stock or isinstance(module, Experts)):
            layers.append(MoELayer(int(found[1]), name, modules[name.rpartition(".")[0]], module))
    if not layers:
        raise InputError(f"{type(model).__name__} has no MoE layers with stacked experts")
    return sorted(layers, key=lambda layer: layer.index)


def check_layout(layer: MoELayer) -> None:
    """Raise InputError when the experts of a stock layer are not laid out as the kernels read them."""
    experts = layer.experts
    flags = {"has_gate": True, "is_concatenated": True, "is_transposed": False, "has_bias": False}
    flags["has_post_expert_norm"] = False
    for flag, wanted in flags.items():
        if getattr(experts, flag, wanted) != wanted:
            raise InputError(f"{layer.name}: experts with {flag}={not wanted} are not supported")
    if getattr(type(experts), "_apply_gate", _default_apply_gate) is not _default_apply_gate:
        raise InputError(f"{layer.name}: experts with a gate function of their own are not supported")
    activation = type(getattr(experts, "act_fn", None)).__name__
    if activation not in ("SiLU", "SiLUActivation"):
        raise InputError(f"{layer.name}: experts with activation {activation} are not supported, only silu")


def expert_tensor_name(layer_name: str, expert: int, projection: int, family: Family) -> str:
    """The checkpoint's name of one expert's weight; projection 0 is gate, 1 up, 2 down."""
    return f"{checkpoint_name(layer_name, family)}.{expert}.{family.projections[projection]}.weight"


def checkpoint_name(name: str, family: Family) -> str:
    """A parameter's name in the checkpoint, from its name in the model."""
    return name.replace(".mlp.", f".{family.block}.") if family.block != "mlp" else name


def model_family(model: PreTrainedModel) -> Family:
    return family_of(model.config.model_type)

"""What a plan has to know of a model: numbers, read off its modules on the meta device."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import nn
from transformers import PreTrainedModel

from esft.checkpoint.device import compute_dtype
from esft.checkpoint.load import load_skeleton
from esft.checkpoint.packed_tensors import packed_format
from esft.checkpoint.source import configuration_digests
from esft.errors import InputError
from esft.experts.moe_layers import moe_layers
from esft.experts.stock_layout import stacked_weights
from esft.selection import ExpertSelection
from esft.swapping.packed_modules import packable
from esft.transformers_internals import whole_layers


@dataclass(frozen=True)
class ExpertLayer:
    """The routed experts of one layer.

    Attributes:
        index: of the layer, as selections have it.
        name: path of the experts' module.
        experts: E.
        shape: (G, D, F) of one expert.
        biased: whether they have biases.
    """

    index: int
    name: str
    experts: int
    shape: tuple[int, int, int]
    biased: bool

    @property
    def expert_size(self) -> int:
        """Parameters of one expert."""
        g, d, f = self.shape
        return g * d + d * f + (g + d) * self.biased


@dataclass(frozen=True)
class Outline:
    """A model in numbers.

    Attributes:
        layers: those with routed experts.
        shared: parameters of shared experts.
        others: parameters of all that is no expert; a tensor of two names counts once.
        linear: (rows, columns, whether of a shared expert, whether of a layer) of each matrix that could be kept in
            few bits.
        dtype: that is computed in.
        depth: number of decoder layers.
        outside: parameters of no decoder layer, embeddings and head above all.
        top_k: experts a token.
        shipped: the format that the checkpoint keeps its experts in, where they are in few bits.
    """

    layers: tuple[ExpertLayer, ...]
    shared: int
    others: int
    linear: tuple[tuple[int, int, bool, bool], ...]
    dtype: torch.dtype
    depth: int
    outside: int
    top_k: int
    shipped: str | None = None

    @property
    def routed(self) -> int:
        return sum(layer.experts * layer.expert_size for layer in self.layers)

    @property
    def parameters(self) -> int:
        return self.routed + self.shared + self.others


def skeleton_of(model: str, dtype: str = "auto", trust_remote_code: bool = False) -> PreTrainedModel:
    """The model on the meta device, in the dtype that it would be computed in on this machine."""
    skeleton = load_skeleton(model, trust_remote_code)
    wanted = compute_dtype(dtype)
    return skeleton if wanted == "auto" else skeleton.to(getattr(torch, wanted))


def outline(model: str, dtype: str = "auto", trust_remote_code: bool = False) -> Outline:
    """Kept for the next time, as long as the files that it is read off are the same.

    Raises InputError for a configuration that makes no model with stacked experts, or one quantized by a method that is
    not read.
    """
    return _outline(model, dtype, trust_remote_code, configuration_digests(model))


@cache
def _outline(model: str, dtype: str, trust_remote_code: bool, digests: tuple[str, ...]) -> Outline:
    skeleton, found = skeleton_of(model, dtype, trust_remote_code), []
    shipped = packed_format(skeleton.config, model)
    for layer in moe_layers(skeleton):
        if isinstance(layer.experts, nn.ModuleList):
            raise InputError(f"{layer.name}: experts that are a ModuleList cannot be planned with")
        up, down, *biases = stacked_weights(layer.experts, layer.name).values()
        rows, columns = up.shape[1:]
        shape = (columns, rows, down.shape[1]) if layer.transposed else (rows, columns, down.shape[2])
        found.append(ExpertLayer(layer.index, layer.name, layer.num_experts, shape, bool(biases)))
    routed, shared = _of_experts(skeleton)
    others = set(skeleton.parameters()) - routed - shared
    weights = [module.weight for module in packable(skeleton, ExpertSelection({})).values()]
    decoder = whole_layers(skeleton)
    inside = {p for layer in decoder for p in layer.parameters()}
    linear = tuple((*weight.shape, weight in shared, weight in inside) for weight in weights)
    counts = sum(p.numel() for p in shared), sum(p.numel() for p in others)
    outside = sum(p.numel() for p in others - inside)
    top_k = getattr(skeleton.config.get_text_config(), "num_experts_per_tok", 1)
    return Outline(tuple(found), *counts, linear, skeleton.dtype, max(len(decoder), 1), outside, top_k, shipped)


def require_beside(skeleton: PreTrainedModel, shared_experts: bool, non_expert_modules: bool) -> None:
    """Let these parts require gradients, and nothing else."""
    routed, shared = _of_experts(skeleton)
    for p in skeleton.parameters():
        p.requires_grad_(p not in routed and (shared_experts if p in shared else non_expert_modules))


def _of_experts(skeleton: PreTrainedModel) -> tuple[set[nn.Parameter], set[nn.Parameter]]:
    """The parameters of routed experts, and those of shared ones."""
    layers = moe_layers(skeleton)
    routed = {p for layer in layers for p in layer.parameters}
    return routed, {p for layer in layers for module in layer.shared_experts for p in module.parameters()}

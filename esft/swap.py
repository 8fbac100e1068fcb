"""Exchanging a model's experts for ones that train only what is selected, and back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from esft.checkpoint import model_digest
from esft.errors import InputError
from esft.families import check_layout, moe_layers
from esft.moe import Experts
from esft.select import ExpertSelection
from esft_kernels.expert_mlp import RECOMPUTE, resolve_backend


@dataclass
class SwapState:
    """What a swapped model remembers: kept as ``model.esft_state``."""

    selection: ExpertSelection
    base_digest: str
    stock: dict[str, nn.Module]  # experts' module path -> the stock module, its weights taken out
    required_grad: dict[str, bool]  # the stock model's requires_grad, by parameter name


def swap_state(model: nn.Module) -> SwapState | None:
    """The state of a swapped model, None for a stock model."""
    return getattr(model, "esft_state", None)


def swap(
    model: PreTrainedModel, selection: ExpertSelection, backend: str = "auto", recompute: str = "none"
) -> PreTrainedModel:
    """Exchange the experts of every MoE layer, in place, so that only what is selected trains.

    The routed experts of a layer that are in ``selection.experts`` form its trained pool; all other parameters get
    ``requires_grad=False``, except shared experts and non-expert modules where the selection includes them. Logits stay
    those of the stock model. At most one layer's experts exist twice at a time.

    Args:
        model: a stock transformers model of a supported family.
        selection: what trains; an empty one only brings the faster experts.
        backend: one of ``esft_kernels.expert_mlp.BACKENDS``.
        recompute: ``frozen`` keeps the pre-activations of the trained experts only, and makes the others again in the
            backward: less memory for one more up projection.

    Raises InputError, with nothing touched, for a model without MoE layers, an expert layout the kernels do not read, a
    selection that does not fit the model, a backend that cannot run here, and a model that is swapped already.
    """
    if swap_state(model) is not None:
        raise InputError("the model is swapped already (unswap it first)")
    layers = moe_layers(model)
    selection.check({layer.index: layer.num_experts for layer in layers})
    for layer in layers:
        check_layout(layer)
    if recompute not in RECOMPUTE:
        raise InputError(f"recompute must be one of {', '.join(RECOMPUTE)}, got {recompute!r}")
    try:
        resolve_backend(backend, model.device)
    except ValueError as error:
        raise InputError(str(error)) from error
    state = SwapState(
        selection, model_digest(model), {}, {name: p.requires_grad for name, p in model.named_parameters()}
    )
    for parameter in model.parameters():
        parameter.requires_grad_(selection.non_expert_modules)
    for layer in layers:
        stock = layer.experts
        chosen = selection.experts.get(layer.index, [])
        experts = Experts(stock.gate_up_proj, stock.down_proj, chosen, backend, recompute)
        experts.train(stock.training)
        setattr(layer.block, layer.attribute, experts)
        _set_weights(stock, torch.empty(0), torch.empty(0))
        state.stock[layer.name] = stock
        for shared in layer.shared_experts:
            shared.requires_grad_(selection.shared_experts)
    model.esft_state = state
    return model


@torch.no_grad()
def unswap(model: PreTrainedModel) -> PreTrainedModel:
    """Put the stock experts back, in place, with the tuned weights inside. Raises InputError for a stock model."""
    state = swap_state(model)
    if state is None:
        raise InputError("the model is not swapped")
    for layer in moe_layers(model):
        stock = state.stock[layer.name]
        assert isinstance(layer.experts, Experts)
        _set_weights(stock, *layer.experts.stacked())
        stock.train(layer.experts.training)
        setattr(layer.block, layer.attribute, stock)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(state.required_grad[name])
    del model.esft_state
    return model


def _set_weights(stock: nn.Module, gate_up, down) -> None:
    stock.gate_up_proj = nn.Parameter(gate_up)
    stock.down_proj = nn.Parameter(down)

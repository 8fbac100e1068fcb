"""Exchanging a model's experts for ones that train only what is selected, and back."""

from __future__ import annotations

import warnings

import torch
from torch import nn
from transformers import PreTrainedModel

from esft.checkpoint.digest import model_base
from esft.errors import InputError
from esft.experts.model_state import (
    DEFAULT_ADAPTER,
    Swapped,
    check_lossless,
    known_state,
    model_state,
    settle_adapter,
    swapped_state,
    uncompiled,
)
from esft.experts.moe_layers import MoELayer, is_dealt, moe_layers
from esft.experts.pooled_experts import BF16, FROZEN, Experts
from esft.experts.stock_layout import Layout, read_layout
from esft.parallel.experts import Deal, NoReplicas, deal_experts
from esft.parallel.ranks import ALONE, Ranks
from esft.selection import ExpertSelection
from esft.swapping.packed_modules import FROZEN_LINEAR, check_finite, pack, packable
from esft.swapping.save_pretrained import attach, detach
from esft.swapping.spread_model import check_spread, gathered, take_over
from esft_kernels.autograd_op import RECOMPUTE
from esft_kernels.backends.resolve import resolve_backend


def swap(
    model: PreTrainedModel,
    selection: ExpertSelection,
    backend: str = "auto",
    recompute: str = "none",
    frozen: str = BF16,
    frozen_linear: str = BF16,
    ranks: Ranks = ALONE,
) -> PreTrainedModel:
    """Exchange the experts of every MoE layer, in place, so that only what is selected trains.

    The routed experts of a layer that are in ``selection.experts`` form its trained pool; all other parameters get
    ``requires_grad=False``, except shared experts and non-expert modules where the selection includes them. Logits stay
    those of the stock model. At most one layer's experts exist twice at a time.

    ``model.save_pretrained`` still writes the stock model's checkpoint. ``model.state_dict()`` has the pools under
    names of their own; ``load_state_dict`` reads either.

    Experts that the kernels cannot compute (an activation of their own, a norm after them) train through plain PyTorch,
    and experts that are a ModuleList stay as they are, with ``requires_grad`` set by expert; both warn once.

    Args:
        model: a stock transformers model.
        selection: what trains; an empty one only brings the faster experts.
        backend: one of ``esft_kernels.BACKENDS``.
        recompute: ``frozen`` keeps the pre-activations of the trained experts only, and makes the others again in the
            backward: less memory for one more up projection.
        frozen: what the frozen experts are kept in: "bf16" (the model's dtype) or a format of ``esft_kernels.formats``,
            which costs some of their precision. ``esft.load`` does that without the stock model in memory.
        frozen_linear: what all other linear layers and embeddings that do not train are kept in, "bf16" (the model's
            dtype), "int8" or "nf4". The head and the routers stay as they are.
        ranks: of a job (``esft.parallel.join.joined``), each of which is to keep a part of every layer's experts; the
            model's passes are collective then. The model may be one that transformers has spread over them by a
            ``DistributedConfig`` with ``ep_size``.

    Raises InputError, with nothing touched, for a model without MoE layers, an expert layout that is not supported, a
    selection that does not fit the model, a backend that cannot run here or a format that cannot hold the experts, and
    a model that is swapped already. One of several ranks that fails half way leaves the model as it is then.
    """
    state = known_state(model)
    if state.swapped is not None:
        raise InputError("the model is swapped already (unswap it first)")
    adapters = state.adapters
    if adapters is not None and adapters.active is not None and adapters.held.keys() != {DEFAULT_ADAPTER}:
        raise InputError("the model has an adapter set: swap its base (set_adapter(model, None) first)")
    layers = moe_layers(model)
    spread = check_spread(model, layers, selection, frozen_linear, ranks)
    layouts = check(layers, selection, model.device, backend, recompute, frozen, frozen_linear, ranks)
    if away := [layer.name for layer in layers if any(p.is_meta for p in layer.experts.parameters())]:
        raise InputError(f"{away[0]}: the weights are not in memory (offloaded?), so they cannot be swapped")
    required_grad = {name: p.requires_grad for name, p in model.named_parameters()}
    to_pack = packable(model, selection) if frozen_linear != BF16 else {}
    check_finite(to_pack, frozen_linear)
    base = model_base(model)
    _warn_where_slow(layers, layouts)
    settle_adapter(model)
    if spread:
        take_over(model)
    stock: dict[str, nn.Module] = {}
    lossless = frozen == frozen_linear == BF16
    begin(model, Swapped(selection, base, required_grad, frozen, frozen_linear, lossless, stock), ranks)
    try:
        for layer, deal in zip(layers, deals(layers, selection, ranks), strict=True):
            if (layout := layouts.get(layer.name)) is not None:
                old, ids = gathered(layer.experts) if spread else layer.experts, selection.experts.get(layer.index, [])
                experts = layout.swapped(old, ids, backend, recompute, frozen, deal=deal)
                experts.train(old.training)
                setattr(layer.block, layer.attribute, experts)
                stock[layer.name] = emptied(old, layout)
    except BaseException as error:  # out of memory, most likely: the layers done so far go back
        if ranks.size == 1:  # else the job ends
            _put_back(model)
        if isinstance(error, ValueError):  # of a format
            raise InputError(str(error)) from error
        raise
    pack(model, to_pack, frozen_linear)
    return thaw(model)


def check(
    layers: list[MoELayer],
    selection: ExpertSelection,
    device: torch.device,
    backend: str,
    recompute: str,
    frozen: str,
    frozen_linear: str,
    ranks: Ranks = ALONE,
) -> dict[str, Layout]:
    """The layouts of a stock model's stacked experts, by the layers' names. Raises what ``swap`` raises."""
    selection.check({layer.index: layer.num_experts for layer in layers}, any(layer.shared_experts for layer in layers))
    stacked = [layer for layer in layers if not isinstance(layer.experts, nn.ModuleList)]
    layouts = {layer.name: read_layout(layer.experts, layer.name) for layer in stacked}
    if ranks.size > 1 and (lists := [layer.name for layer in layers if layer.name not in layouts]):
        raise InputError(f"{lists[0]}: experts that are a ModuleList cannot be dealt out over processes")
    if recompute not in RECOMPUTE:
        raise InputError(f"recompute must be one of {', '.join(RECOMPUTE)}, got {recompute!r}")
    if frozen not in FROZEN:
        raise InputError(f"frozen must be one of {', '.join(FROZEN)}, got {frozen!r}")
    if frozen_linear not in FROZEN_LINEAR:
        raise InputError(f"frozen_linear must be one of {', '.join(FROZEN_LINEAR)}, got {frozen_linear!r}")
    if frozen != BF16 and (plain := [layer.name for layer in layers if not _is_fused(layouts.get(layer.name))]):
        raise InputError(f"{plain[0]}: the kernels do not compute these experts, so they cannot be frozen in {frozen}")
    if backend == "cpu_packed" and frozen != BF16:
        raise InputError(f"backend cpu_packed packs plain weights, not frozen {frozen}; backend cpu computes these")
    try:
        resolve_backend(backend, device)
    except ValueError as error:
        raise InputError(str(error)) from error
    return layouts


def _is_fused(layout: Layout | None) -> bool:
    return layout is not None and layout.is_fused


def deals(layers: list[MoELayer], selection: ExpertSelection, ranks: Ranks) -> list[Deal | None]:
    """Who holds what of every layer; None where this process holds all."""
    if ranks.size == 1:
        return [None] * len(layers)
    return [
        deal_experts(selection.experts.get(layer.index, []), layer.num_experts, ranks, turn)
        for turn, layer in enumerate(layers)
    ]


def begin(model: PreTrainedModel, swapped: Swapped, ranks: Ranks) -> None:
    """Make the model a swapped one: what is remembered of it, and how it is saved. Nothing trains yet.

    Raises RankError where a rank has another base, selection or format than the first one.
    """
    kinds = {"frozen": swapped.frozen, "frozen_linear": swapped.frozen_linear}
    ranks.check_alike({"model": swapped.base.digest, "selection": str(swapped.selection), **kinds})
    model.requires_grad_(False)
    model_state(model).swapped = swapped
    attach(model)
    if ranks.size > 1:
        ranks.lockstep = True
        vars(model)["_ddp_params_and_buffers_to_ignore"] = NoReplicas()


def emptied(stock: nn.Module, layout: Layout) -> nn.Module:
    """A stock module with its weights taken out."""
    _set_weights(stock, layout.names, [torch.empty(0)] * len(layout.names))
    return stock


def thaw(model: PreTrainedModel) -> PreTrainedModel:
    """Let what the selection names train, in place; nothing else is touched.

    ``swap`` does this. It is for after another library has frozen the model, as PEFT does around its own weights.
    Raises InputError for a stock model.
    """
    inner = uncompiled(model)
    selection = swapped_state(inner).selection
    layers = moe_layers(inner)
    of_experts = {p for layer in layers for p in layer.parameters}
    shared = {p for layer in layers for m in layer.shared_experts for p in m.parameters()}
    for parameter in inner.parameters():
        trains = selection.shared_experts if parameter in shared else selection.non_expert_modules
        if trains and parameter not in of_experts:
            parameter.requires_grad_()
    for layer in layers:
        for parameter in layer.trained_parameters(selection.experts.get(layer.index, [])):
            parameter.requires_grad_()
    return model


def _warn_where_slow(layers: list[MoELayer], layouts: dict[str, Layout]) -> None:
    """Say once which experts train more slowly than the others, and why."""
    reasons: dict[str, str] = {}
    for layer in layers:
        layout = layouts.get(layer.name)
        if layout is None:
            reasons[type(layer.experts[0]).__name__] = "they are a ModuleList, which runs through the model's own loop"
        elif not layout.is_fused:
            why = "a norm after each expert" if layout.norm is not None else "an activation of their own"
            reasons[type(layer.experts).__name__] = f"they have {why}, which runs through plain PyTorch"
    for name, reason in reasons.items():
        warnings.warn(f"{name}: the kernels do not compute these experts: {reason}, slower", stacklevel=3)


@torch.no_grad()
def unswap(model: PreTrainedModel) -> PreTrainedModel:
    """Put the stock experts back, in place, with the tuned weights inside.

    Raises InputError for a stock model, for frozen experts in a format that has cost some of their precision, and for a
    model that holds adapters side by side, or whose experts are dealt out over processes.
    """
    if is_dealt(uncompiled(model)):
        raise InputError("the experts are dealt out over processes: none has the stock model's weights")
    if known_state(uncompiled(model)).mixed is not None:
        raise InputError("the model holds adapters side by side, for which the stock modules have no place")
    check_lossless(uncompiled(model), "unswap")
    return _put_back(model)


def _put_back(model: PreTrainedModel) -> PreTrainedModel:
    inner = uncompiled(model)
    swapped = swapped_state(inner)
    layers = moe_layers(inner)
    while layers:
        layer = layers.pop()  # and no other reference: the pools go before the next layer's weights are made
        if isinstance(layer.experts, Experts):
            stock = swapped.stock[layer.name]
            _set_weights(stock, layer.experts.stock_names, layer.experts.stacked())
            stock.train(layer.experts.training)
            setattr(layer.block, layer.attribute, stock)
    for name, parameter in inner.named_parameters():
        if name in swapped.required_grad:  # another library may have added some, as PEFT does
            parameter.requires_grad_(swapped.required_grad[name])
    detach(inner)
    model_state(inner).swapped = None
    return model


def _set_weights(stock: nn.Module, names: tuple[str, ...], weights: list[torch.Tensor]) -> None:
    for name, weight in zip(names, weights, strict=True):
        setattr(stock, name, nn.Parameter(weight))

"""What the routers of a model decide, seen at the seam: their logits, and what the experts are called with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esft.errors import InputError
from esft.experts.moe_layers import GATE, MoELayer, moe_layers


def _softmax(logits_TE: Tensor) -> Tensor:
    return logits_TE.softmax(dim=-1)


# What routers make of their logits before they choose; some return the probabilities in the logits' place.
GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": _softmax,
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": lambda logits_TE: F.softplus(logits_TE).sqrt(),
    "probabilities": lambda logits_TE: logits_TE,
}


def gate_of(logits_TE: Tensor, index_TK: Tensor, weights_TK: Tensor) -> str | None:
    """The name in ``GATES`` of what a router applied to its logits; None where it cannot be told.

    Renormalising over the chosen experts, scaling, and a softmax over the chosen logits alone all leave a token's
    weights in proportion to its gate values, so the right function is the one with that proportion. One choice a token
    tells nothing.
    """
    if index_TK.shape[1] < 2:
        return None
    weights_dtype, weights_TK = weights_TK.dtype, weights_TK.float()
    share_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
    errors: dict[str, Tensor] = {}
    for name, function in GATES.items():
        gates_TK = function(logits_TE.float()).gather(1, index_TK)
        errors[name] = (gates_TK / gates_TK.sum(dim=-1, keepdim=True) - share_TK).abs()
    best = min(errors, key=lambda name: float(errors[name].mean()))
    tolerance = 8 * max(torch.finfo(logits_TE.dtype).eps, torch.finfo(weights_dtype).eps)
    return best if errors[best].max() <= tolerance else None


@dataclass(frozen=True)
class Choice:
    """One layer's choice of experts for the tokens that count.

    Attributes:
        gates_TE: float32 [T, E] gate values before any renormalisation or scaling; differentiable. NaN where the
            router's weights are no numbers. None where each token has one expert and the family is not in ``GATE``:
            then the weights do not tell the gate function.
        index_TK: [T, K] chosen experts.
        weights_TK: [T, K] what the experts' outputs are multiplied by.
        x_TD: [T, D] what the experts get.
    """

    gates_TE: Tensor | None
    index_TK: Tensor
    weights_TK: Tensor
    x_TD: Tensor

    @property
    def taken_TK(self) -> Tensor:
        """Bool [T, K], false for an empty slot: some routers can skip the experts, with a weight of 0."""
        return self.weights_TK != 0


@contextmanager
def watch_routers(model: nn.Module, keep_T: Tensor, then: Callable[[MoELayer, Choice], None]) -> Iterator[None]:
    """Call ``then`` for every MoE layer of the forward passes inside the block.

    Args:
        model: stock or swapped.
        keep_T: bool [T], the tokens that count, of the batch that the model is called with.
        then: gets the layer and what its router chose for these tokens; not called without any.

    Raises InputError for experts in a ModuleList, and in the forward pass for routers whose gate values cannot be told.
    """
    layers = moe_layers(model)
    if listed := [layer.name for layer in layers if isinstance(layer.experts, nn.ModuleList)]:
        raise InputError(f"{listed[0]}: experts in a ModuleList hide which tokens they get, and cannot be scored")
    handles = []
    try:
        for layer in layers:
            watcher = _Watcher(layer, keep_T, then, GATE.get(model.config.get_text_config().model_type))
            handles.append(layer.router.register_forward_hook(watcher.on_router))
            handles.append(layer.experts.register_forward_pre_hook(watcher.on_experts, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Watcher:
    """Hooks on one layer's router and experts."""

    def __init__(self, layer: MoELayer, keep_T: Tensor, then: Callable[[MoELayer, Choice], None], gate: str | None):
        self.layer, self.keep_T, self.then, self.gate = layer, keep_T, then, gate
        self.logits: Tensor | None = None

    def on_router(self, module: nn.Module, args: tuple, output: tuple | Tensor) -> None:
        # The logits come first, last or alone: that depends on the family and on the version of transformers. There may
        # be more of them than experts, for what else a token can choose.
        outputs, experts = output if isinstance(output, tuple) else (output,), self.layer.num_experts
        self.logits = next((t for t in outputs if t.is_floating_point() and t.shape[-1] >= experts), None)

    def on_experts(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        x_TD, index_TK, weights_TK = (*args, *kwargs.values())
        if self.logits is None:
            raise InputError(f"{self.layer.name}: the router gives no logits, so its tokens cannot be scored")
        if index_TK.shape[0] != self.keep_T.numel():
            tokens = f"{index_TK.shape[0]} of {self.keep_T.numel()} tokens"
            raise InputError(f"{self.layer.name}: gets {tokens}, so they cannot be scored")
        keep_T = self.keep_T.to(index_TK.device)
        logits_TE = self.logits.reshape(index_TK.shape[0], -1)[keep_T]
        index_TK, weights_TK = index_TK[keep_T], weights_TK.detach()[keep_T]
        if not index_TK.numel():
            return
        gate = self.gate or gate_of(logits_TE.detach(), index_TK, weights_TK)
        if gate is None and not bool(weights_TK.isfinite().all()):
            gates_TE = torch.full_like(logits_TE, torch.nan, dtype=torch.float32)
        elif gate is None and index_TK.shape[1] > 1:
            raise InputError(f"{self.layer.name}: the router makes of its logits none of {', '.join(GATES)}")
        else:
            gates_TE = None if gate is None else GATES[gate](logits_TE.float())
        self.then(self.layer, Choice(gates_TE, index_TK, weights_TK, x_TD.detach()[keep_T]))

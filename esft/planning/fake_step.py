"""A training step on fake tensors: the model's own code, with shapes and without values, and what it would take."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from esft.errors import InputError, first_line
from esft.evaluation.cross_entropy import linear_cross_entropy
from esft.planning.live_bytes import LiveBytes
from esft.planning.stand_in import Sizes, StandIn
from esft.short_attention import use_short_attention


@dataclass(frozen=True)
class Batch:
    """What goes through the model together: records of so many tokens each, and whether gradients of others wait."""

    records: int
    length: int
    accumulates: bool = False

    @property
    def tokens(self) -> int:
        return self.records * self.length


@dataclass(frozen=True)
class StepBytes:
    """Of one step, beside weights and optimizer: kept for the backward, and the largest sum with all that comes and
    goes, gradients among it."""

    kept: int
    peak: int


def fake_step(skeleton: Any, experts: Mapping[str, Sizes], batch: Batch, recompute_layers: bool = False) -> StepBytes:
    """What a step takes on a CPU.

    Args:
        skeleton: a causal language model on the meta device, in which exactly what trains requires a gradient, its
            routed experts aside; it is used up.
        experts: of every MoE layer, by the path of its experts' module.
        batch: every token counts in the loss.
        recompute_layers: whether layers are made again in the backward.

    Raises InputError for a model whose code asks for values on its way.
    """
    causal_lm = skeleton.get_base_model() if hasattr(skeleton, "get_base_model") else skeleton
    dtype = causal_lm.dtype
    log = logging.getLogger("torch._subclasses.fake_tensor")  # would print the traceback of what is told in one line
    heard, log.disabled = log.disabled, True
    try:
        with FakeTensorMode():
            for name, sizes in experts.items():
                causal_lm.set_submodule(name, StandIn(sizes, dtype))
            _materialise(causal_lm)
            return _measured(causal_lm.train(), batch, recompute_layers)
    except InputError:
        raise
    except Exception as error:  # whatever a model's code says of tensors without values
        raise InputError(f"{type(causal_lm).__name__}: its step cannot be planned ({first_line(error)})") from error
    finally:
        log.disabled = heard


def _materialise(model: nn.Module) -> None:
    """Fake tensors on the CPU for what is on the meta device; a tensor of two names stays one."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        alone = {"recurse": False, "remove_duplicate": False}
        for name, tensor in [*module.named_parameters(**alone), *module.named_buffers(**alone)]:
            if tensor.is_meta:
                if id(tensor) not in made:
                    new = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                    parameter = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if parameter else new
                setattr(module, name, made[id(tensor)])


def _measured(causal_lm: Any, batch: Batch, recompute_layers: bool) -> StepBytes:
    if recompute_layers:
        causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
    use_short_attention(causal_lm)
    ids = torch.zeros(batch.records, batch.length, dtype=torch.int64)
    labels, mask = ids.flatten(), torch.ones_like(ids)
    head = causal_lm.get_output_embeddings().weight
    with LiveBytes([*causal_lm.parameters(), *causal_lm.buffers(), ids, mask]) as live:
        kept = 0
        for _ in range(1 + batch.accumulates):
            before = live.now
            hidden = causal_lm.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            kept = live.now - before
            loss = linear_cross_entropy(hidden.flatten(0, 1), head, labels)
            del hidden
            loss.backward()
            del loss
    return StepBytes(kept, live.peak)

"""A training step on fake tensors: the model's own code, with shapes and without values, and what it would take."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from math import ceil, inf
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from esft.errors import InputError, first_line
from esft.evaluation.cross_entropy import linear_cross_entropy
from esft.planning.live_bytes import LiveBytes, TooMany
from esft.planning.stand_in import Sizes, StandIn
from esft.short_attention import use_short_attention
from esft.transformers_internals import recompute_layers_of, whole_layers

# A layer that goes token by token in Python, as Mamba's without its kernels, makes more operations than this: so many,
# and so many a token. As that would take minutes, its step is planned of shorter records, as many tokens in all.
MANY, MANY_A_TOKEN = 2500, 8
SHORT = 8  # tokens of such a record


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
    goes, gradients among it; whether it is that of shorter records, without what grows with the square of a length."""

    kept: int
    peak: int
    of_shorter: bool = False


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
            if recompute_layers:
                recompute_layers_of(causal_lm)
            use_short_attention(causal_lm)
            return _in_time(causal_lm.train(), batch)
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


def _in_time(causal_lm: Any, batch: Batch) -> StepBytes:
    """A step, or that of shorter records where layers go token by token: the shorter, the fewer operations."""
    shorter = Batch(ceil(batch.tokens / SHORT), SHORT, batch.accumulates)
    with suppress(TooMany):
        return _measured(causal_lm, batch, max(MANY, MANY_A_TOKEN * batch.length))
    with suppress(TooMany):  # as many of them, however short the records are
        return replace(_measured(causal_lm, shorter, MANY // 2), of_shorter=True)
    return _measured(causal_lm, batch, inf)


def _measured(causal_lm: Any, batch: Batch, most: float) -> StepBytes:
    """A step in which no layer's forward may make more operations. Raises TooMany where one does."""
    ids = torch.zeros(batch.records, batch.length, dtype=torch.int64)
    labels, mask = ids.flatten(), torch.ones_like(ids)
    head = causal_lm.get_output_embeddings().weight
    causal_lm.zero_grad()
    with (
        LiveBytes([*causal_lm.parameters(), *causal_lm.buffers(), ids, mask]) as live,
        _bounded(whole_layers(causal_lm), live, most),
    ):
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


@contextmanager
def _bounded(layers: Iterable[nn.Module], live: LiveBytes, most: float) -> Iterator[None]:
    """No layer's forward makes more operations in the block."""

    def limit(of: float) -> Callable[..., None]:
        return lambda *_: setattr(live, "left", of)

    hooks = [
        hook
        for layer in layers
        for hook in (layer.register_forward_pre_hook(limit(most)), layer.register_forward_hook(limit(inf)))
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()

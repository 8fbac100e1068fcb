"""transformers' ``Trainer`` for a model whose experts are dealt out over ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn.utils import clip_grads_with_norm_
from transformers import Trainer

from esft.errors import InputError
from esft.experts.moe_layers import dealt_parameters, is_dealt, ranks_of

# What ``Trainer`` calls of its own and finds replaced here: without the call gradients would not be added up.
_REPLACED = (
    "_clip_grad_norm", "_get_grad_norm", "_sync_replicated_trainable_parameters", "_defer_fsdp_gradient_reduction",
)  # fmt: skip


class DealtTrainer(Trainer):
    """``Trainer`` by several processes, each of which has some of every layer's experts.

    Its arguments are those of ``Trainer``, the model is one of ``swap`` or ``load`` with ``ranks``, and all of these
    train, evaluate and save together. What is not dealt out is the same on every rank, and so are its steps.

    Where ``Trainer`` leaves a model to ``DistributedDataParallel``, which takes all ranks to have the same parameters,
    this adds the gradients up itself, once for every step: of the parameters that all ranks have. A dealt expert has
    its whole gradient where it is. The norm, by which they are clipped, is that of all ranks' gradients.

    Raises InputError for a model whose experts are not dealt out, and for arguments that ask for the optimizer's state
    in files (every rank has another, and ``Trainer`` writes one) or for a loss that is scaled (fp16).
    """

    def __init__(self, *arguments: Any, **more: Any):
        if missing := next((name for name in _REPLACED if not hasattr(Trainer, name)), None):
            raise InputError(f"transformers {transformers.__version__}: its Trainer has no {missing}; that of 5.23 has")
        super().__init__(*arguments, **more)
        if not is_dealt(self.model):
            raise InputError("the model's experts are not dealt out over processes: transformers' Trainer trains it")
        if self.args.fp16:
            raise InputError("fp16 scales every rank's loss in a way of its own: use bf16")
        if self.args.save_strategy != "no" and not self.args.save_only_model:
            raise InputError("the optimizer's state is dealt out, too, and is not saved: set save_only_model")
        if self.args.load_best_model_at_end:
            raise InputError("load_best_model_at_end cannot read dealt experts: save_adapter and load_adapter can")
        self.ranks = ranks_of(self.model)
        self.is_distributed_loading_by_transformers = True  # no wrapper, and all ranks come to save the model

    def train(self, resume_from_checkpoint: str | bool | None = None, *arguments: Any, **more: Any) -> Any:
        """As of ``Trainer``. Raises InputError where it is to resume."""
        if resume_from_checkpoint:
            raise InputError("Trainer does not go on with dealt experts; esft train --resume does")
        return super().train(None, *arguments, **more)

    def _sync_replicated_trainable_parameters(self, model: nn.Module) -> None:
        """Give all ranks the first one's values of what all of them train, as of new weights of LoRA."""
        ours = self._replicated()
        told = self.ranks.spread({n: p.detach().cpu() for n, p in ours.items()} if self.ranks.main else None)
        with torch.no_grad():
            for name, value in told.items():
                ours[name].copy_(value)

    @contextmanager
    def _defer_fsdp_gradient_reduction(self) -> Iterator[None]:
        """Nothing: gradients are added up before the step, and FSDP2 has only frozen parameters."""
        yield

    def _clip_grad_norm(self, model: nn.Module) -> float:
        return self._ready_to_step(self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: float | None = None) -> float:
        return self._ready_to_step(math.inf) if grad_norm is None else grad_norm  # one of the two comes first

    def _ready_to_step(self, largest: float) -> float:
        """Make all gradients those of a step, and clip them; collective. Returns their norm before.

        The loss of a rank is, as for ``DistributedDataParallel``, one of which the mean over the ranks is trained.
        """
        trained, ours = self._trained(), self._replicated()
        self.ranks.add_up([*ours.values()])
        squares = {on_all: torch.zeros((), device=self.args.device) for on_all in (False, True)}
        for name, p in trained.items():
            if p.grad is not None:
                p.grad /= self.ranks.size
                squares[name in ours] += torch.linalg.vector_norm(p.grad, dtype=torch.float32).square()
        norm = (self.ranks.sum(squares[False]) + squares[True]).sqrt()
        if math.isfinite(largest):
            clip_grads_with_norm_(trained.values(), largest, norm)
        return norm.item()

    def _trained(self) -> dict[str, nn.Parameter]:
        model: Any = self.model
        return {name: p for name, p in model.named_parameters() if p.requires_grad}

    def _replicated(self) -> dict[str, nn.Parameter]:
        """What trains and every rank has, alike."""
        dealt = dealt_parameters(self.model)
        return {name: p for name, p in self._trained().items() if name not in dealt}

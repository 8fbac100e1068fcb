"""The steps of a training: gradients of a batch, the update, and what is told of both."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from esft.data.batches import collate
from esft.data.examples import Example, joined
from esft.errors import DivergenceError, InputError
from esft.evaluation.loss import batch_loss, has_plain_head
from esft.parallel.ranks import ALONE, Ranks
from esft.runs.checkpoints import RECENT, State
from esft.runs.config import TrainConfig
from esft.training.load_balancing import balance_losses
from esft.training.optim import MasterAdamW
from esft.training.schedule import learning_rate
from esft.training.separation import check_separates


class Steps:
    """Updates of a model, one a batch.

    Attributes:
        losses: of the steps so far; of those before the last checkpoint, that a run goes on from, the last ones.
        tokens: that went through the model, not those of steps before that checkpoint.
    """

    def __init__(self, model: nn.Module, pad: int, config: TrainConfig, ranks: Ranks = ALONE):
        """Raises InputError for a model that does not keep documents apart which the settings put into one row."""
        self.model, self.pad, self.config, self.ranks = model, pad, config, ranks
        self.together = config.micro_batch_size or config.batch_size
        self.optimizer = MasterAdamW(model.named_parameters(), config)
        self.losses: list[float] = []
        self.tokens = 0
        if config.packing or config.padding_free or config.eval_packing:
            check_separates(model)
        has_plain_head(model)  # tries the model out the first time, which a step that watches its routers cannot have

    def load(self, state: State) -> None:
        """Go on from a state. Raises InputError for one that is not of this model and these settings."""
        if state.step >= self.config.steps and not state.losses:
            raise InputError(f"step {state.step} is the last one, and its loss is not kept: ask for more steps")
        self.optimizer.load_state(state.tensors)
        self.losses = list(state.losses)

    def state(self, step: int) -> State:
        """What to go on from after this step. Raises DivergenceError as ``check_weights`` does."""
        self.check_weights(step)
        return State(step, self.losses[-RECENT:], self.optimizer.state())

    def check_weights(self, step: int) -> None:
        """Raise DivergenceError for weights that are no numbers, before they are stored.

        The gradients of the next step would show it too, but the last one has none.
        """
        if (name := self.optimizer.overflowed()) is not None:
            raise DivergenceError(f"step {step}: {name} holds what is no finite number; lower the learning rate")

    @property
    def recent_loss(self) -> float:
        recent = self.losses[-RECENT:]
        return sum(recent) / len(recent)

    def update(self, step: int, records: Sequence[Example]) -> dict[str, float]:
        """One update from one batch; ``step`` counts from 1. Returns what to log."""
        begun = time.monotonic()
        # What a model draws (dropout, jitter) depends on the step alone, so that a resumed run draws it too.
        own = f"/{self.ranks.rank}" if self.ranks.rank else ""  # unlike rows need unlike draws
        torch.manual_seed(random.Random(f"{self.config.seed}/{step - 1}{own}").getrandbits(63))
        loss, extra = self._gradients(records)
        rate = learning_rate(self.config, step - 1)
        norm = self.optimizer.step(rate)
        if not all(map(math.isfinite, (measured := {"loss": loss, **extra, "gradient norm": norm}).values())):
            told = ", ".join(f"{name} {value}" for name, value in measured.items())
            raise DivergenceError(f"step {step}: {told}; lower the learning rate")
        count = sum(len(record.ids) for record in records)
        self.losses.append(loss)
        self.tokens += count
        speed = count / (time.monotonic() - begun)
        return {"loss": loss, **extra, "lr": rate, "grad_norm": norm, "tokens_per_second": speed}

    def _gradients(self, records: Sequence[Example]) -> tuple[float, dict[str, float]]:
        """Gradients of one batch. Returns the mean cross entropy of its supervised tokens, and what else to log."""
        targets = sum(record.targets for record in records)
        losses, balances = [], []
        for part, count in self.ranks.rounds(records, lambda record: len(record.ids), self.together):
            batch = collate([joined(part)] if self.config.padding_free else part, self.pad) if part else {}
            # Of a rank without rows that has to go along, a row counts for nothing.
            loss = (
                torch.zeros(()) if part or not self.ranks.lockstep else 0.0 * self._loss(collate(records[:1], self.pad))
            )
            with self._balance_losses(batch) as aux:
                loss = self._loss(batch) / targets if part else loss
            losses.append(loss.detach())
            if aux:
                share = count / len(records)
                balance = share * torch.stack([each.to(loss.device) for each in aux]).sum()  # over several GPUs
                balances.append(balance.detach())
                loss = loss + self.config.aux_loss * balance
            if loss.requires_grad:
                loss.backward()
        self.ranks.add_up([*self.optimizer.params.values()])
        loss, balance = self.ranks.totals(_sum(losses), _sum(balances))
        return loss, {"aux_loss": balance} if self.config.aux_loss else {}

    def _loss(self, batch: dict[str, Tensor]) -> Tensor:
        return batch_loss(self.model, batch)[0]

    def _balance_losses(self, batch: dict[str, Tensor]) -> AbstractContextManager[list[Tensor]]:
        if not self.config.aux_loss:
            return nullcontext([])
        return balance_losses(self.model, batch.get("attention_mask"), self.ranks)


def _sum(losses: list[Tensor]) -> float:
    return torch.stack(losses).sum().item() if losses else 0.0

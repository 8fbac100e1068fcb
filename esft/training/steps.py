"""The steps of a training: gradients of a batch, the update, and what is told of both."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from esft.data.batches import collate
from esft.data.examples import Example, joined
from esft.errors import DivergenceError, InputError
from esft.evaluation.loss import batch_loss, has_plain_head
from esft.experts.moe_layers import dealt_parameters
from esft.optimizer.adamw import MasterAdamW
from esft.optimizer.schedule import learning_rate
from esft.parallel.ranks import ALONE, Ranks
from esft.runs.checkpoints import RECENT, State
from esft.runs.config import TrainConfig
from esft.training.auxiliary_losses import Base, balance_losses, held_loss
from esft.training.separation import check_separates

NAMED = 16  # records, in the message about a step that went wrong

Parts = Sequence[tuple[Sequence[Example], int]]  # a batch's rows by micro batch; of how many on all ranks they are


class Steps:
    """Updates of a model, one a batch.

    Attributes:
        losses: of the steps so far; of those before the last checkpoint, that a run goes on from, the last ones.
        supervised: share of the last batch's tokens.
        tokens: that went through the model, not those of steps before that checkpoint.
    """

    def __init__(
        self,
        model: nn.Module,
        pad: int,
        config: TrainConfig,
        places: Callable[[Sequence[Example]], list[str]] = lambda rows: [],
        ranks: Ranks = ALONE,
    ):
        """
        Args:
            model: in which exactly that requires gradients which is to train.
            pad: token id.
            config: of the run.
            places: tells where the records of some rows are from.
            ranks: that share the rows of every batch.

        Raises InputError for a model that does not keep documents apart which the settings put into one row.
        """
        self.model, self.pad, self.config, self.places, self.ranks = model, pad, config, places, ranks
        self.together = config.micro_batch_size or config.batch_size
        self.dealt = dealt_parameters(model)
        self.optimizer = MasterAdamW(model.named_parameters(), config, self.dealt, ranks)
        self.losses: list[float] = []
        self.tokens, self.supervised = 0, 0.0
        self.base = Base(model) if config.kl_weight else None
        if config.packing or config.padding_free or config.eval_packing:
            check_separates(model)
        has_plain_head(model)  # tries the model out the first time, which a step that watches its routers cannot have

    def load(self, state: State) -> None:
        """Go on from a state. Raises InputError for one that is not of this model and these settings."""
        if state.step >= self.config.steps and not state.losses:
            raise InputError(f"step {state.step} is the last one, and its loss is not kept: ask for more steps")
        self.load_weights(state)
        self.losses = list(state.losses)

    def load_weights(self, state: State) -> None:
        """Take over a state's weights and moments; where experts are dealt out, this rank's."""
        tensors = dict(state.tensors)
        for name in self._parts(tensors):
            sizes, whole = self.dealt[name.partition("/")[2]], tensors[name]
            if not sizes[self.ranks.rank]:
                del tensors[name]
            elif whole.dim() and len(whole) % sum(sizes) == 0:
                rows = [len(whole) // sum(sizes) * size for size in sizes]
                tensors[name] = whole.split(rows)[self.ranks.rank]
        self.optimizer.load_state(tensors)

    def _parts(self, tensors: Iterable[str]) -> frozenset[str]:
        return frozenset(name for name in tensors if name.partition("/")[2] in self.dealt)

    def state(self, step: int) -> State:
        """What to go on from after this step. Raises DivergenceError as ``check_weights`` does."""
        self.check_weights(step)
        tensors = self.optimizer.state()
        return State(step, self.losses[-RECENT:], tensors, parts=self._parts(tensors))

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
        """One update from one batch; ``step`` counts from 1. Returns what to log.

        Raises DivergenceError naming micro batch and records for a loss or a gradient that is no number.
        """
        begun = time.monotonic()
        self._seed(step)
        parts = self.ranks.rounds(records, lambda record: len(record.ids), self.together)
        supervised = sum(record.targets for record in records)
        targets = max(supervised, 1)  # pieces of long records may have nothing to learn
        losses, *sums = self._gradients(parts, targets)
        # A dealt expert has its whole gradient where it is.
        self.ranks.add_up([p for name, p in self.optimizer.params.items() if name not in self.dealt])
        loss, balance, divergence, held = self.ranks.totals(losses.sum().item(), *sums)
        extra = {"aux_loss": balance} if self.config.aux_loss else {}
        extra |= {"kl": divergence / held} if held else {}
        rate = learning_rate(self.config, step - 1)
        norm = self.optimizer.step(rate)
        if not all(map(math.isfinite, (measured := {"loss": loss, **extra, "gradient norm": norm}).values())):
            told = ", ".join(f"{name} {value}" for name, value in measured.items())
            held_by = self.ranks.gathered(self._held(step, parts, losses, targets))
            held_by.sort(key=lambda each: not each.startswith("Micro batch"))  # whose loss it was knows which
            raise DivergenceError(f"step {step}: {told}; lower the learning rate. {held_by[0]}")
        count = sum(len(record.ids) for record in records)
        self.supervised = supervised / count
        self.losses.append(loss)
        self.tokens += count
        speed = count / (time.monotonic() - begun)
        return {"loss": loss, **extra, "lr": rate, "grad_norm": norm, "tokens_per_second": speed}

    def _seed(self, step: int) -> None:
        """What a model draws (dropout, jitter) depends on the step alone, so that a resumed run draws it too."""
        own = f"/{self.ranks.rank}" if self.ranks.rank else ""  # unlike rows need unlike draws
        torch.manual_seed(random.Random(f"{self.config.seed}/{step - 1}{own}").getrandbits(63))

    def _gradients(self, parts: Parts, targets: int, until_broken: bool = False) -> tuple[Tensor, float, float, int]:
        """Gradients of this rank's part of a batch, added up over its micro batches.

        Args:
            parts: the micro batches.
            targets: supervised tokens of the whole batch.
            until_broken: end after the first micro batch with which they hold what is no number.

        Returns [P], what each micro batch adds to the mean cross entropy of the supervised tokens; the auxiliary loss;
        the divergence from the base, summed over the tokens that are held to it, and their number.
        """
        every = sum(count for _, count in parts)
        losses, balances, divergences, held = [], [], [], 0
        for part, count in parts:
            batch = collate([joined(part)] if self.config.padding_free else part, self.pad) if part else {}
            loss = torch.zeros(()) if part or not self.ranks.lockstep else self._loss_of_nothing()
            base = None if self.base is None else self.base.predictions(batch)
            divergence = None
            with self._balance_losses(batch) as aux:
                if base is not None:
                    total, divergence = held_loss(self.model, batch, base)
                    loss = total / targets
                elif part:
                    loss = batch_loss(self.model, batch)[0] / targets
            losses.append(loss.detach())
            if base is not None and divergence is not None:
                divergences.append(divergence.detach())
                held += len(base.labels_N)
                loss = loss + self.config.kl_weight * divergence / targets
            if aux:
                # Over several GPUs they are on several.
                balance = count / every * torch.stack([each.to(loss.device) for each in aux]).sum()
                balances.append(balance.detach())
                loss = loss + self.config.aux_loss * balance
            if loss.requires_grad:
                loss.backward()
            if until_broken and not self.optimizer.gradients_are_finite():
                break
        balance, divergence = (torch.stack(each).sum().item() if each else 0.0 for each in (balances, divergences))
        return torch.stack(losses), balance, divergence, held

    def _loss_of_nothing(self) -> Tensor:
        """Of a rank without rows that has to go along with the others."""
        return 0.0 * batch_loss(self.model, collate([Example([self.pad] * 2, [self.pad] * 2)], self.pad))[0]

    def _balance_losses(self, batch: dict[str, Tensor]) -> AbstractContextManager[list[Tensor]]:
        if not self.config.aux_loss:
            return nullcontext([])
        return balance_losses(self.model, batch.get("attention_mask"), self.ranks)

    def _held(self, step: int, parts: Parts, losses: Tensor, targets: int) -> str:
        """Which micro batch a step came to grief with, and what it held: the first whose loss is no number.

        If only the gradient is none, the step is computed again, with a look at the gradient after each micro batch.
        """
        broken = next((i for i, loss in enumerate(losses.tolist()) if not math.isfinite(loss)), None)
        if broken is None and self.ranks.size == 1:
            self.model.zero_grad()
            self._seed(step)
            computed, *_ = self._gradients(parts, targets, until_broken=True)
            # On a GPU it need not come out the same.
            broken = None if self.optimizer.gradients_are_finite() else len(computed) - 1
        rows = parts[broken][0] if broken is not None else [record for part, _ in parts for record in part]
        named = self.places(rows)
        more = f" and {len(named) - NAMED} more" if len(named) > NAMED else ""
        what = f"Micro batch {broken + 1} of {len(parts)}" if broken is not None else "The batch"
        return f"{what} held {', '.join(named[:NAMED])}{more}" if named else what

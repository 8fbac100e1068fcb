"""The training loop: one for ESFT, full fine-tuning and LoRA."""

from __future__ import annotations

import logging
import math
import random
import time
import warnings
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from esft.checkpoint.load import load_tokenizer
from esft.checkpoint.source import Reach, open_config
from esft.data.batches import collate
from esft.data.examples import Example, joined
from esft.data.mixing import mixed_in
from esft.data.sources import DataSource
from esft.errors import DivergenceError, InputError, Interrupted
from esft.memory import peak_memory, peak_rss
from esft.runs.checkpoints import RECENT, State
from esft.runs.config import TrainConfig
from esft.runs.opened import opened
from esft.runs.run_folder import RunFolder
from esft.selection import ExpertSelection
from esft.signals import stop_signals
from esft.storage.outputs import check_apart
from esft.training.evaluate import batch_loss, has_plain_head, mean_loss
from esft.training.load_balancing import balance_losses
from esft.training.methods import METHODS, Source
from esft.training.optim import MasterAdamW
from esft.training.run_data import Data, RunData, sources_of
from esft.training.schedule import learning_rate
from esft.training.separation import check_separates
from esft.training.short_attention import use_short_attention

logger = logging.getLogger("esft")


@dataclass(frozen=True)
class TrainResult:
    """What a run measured.

    ``peak_rss`` is the process's largest resident memory so far and ``peak_gpu_memory`` that of its tensors on the
    GPUs, in bytes; ``seconds`` is the loop's own time.
    """

    steps: int
    train_loss: float
    eval_loss: float | None
    trained_parameters: int
    stored_bytes: int
    seconds: float
    tokens_per_second: float
    peak_rss: int
    peak_gpu_memory: int


def train(
    model_path: str,
    data: Data,
    out: str | Path,
    config: TrainConfig | None = None,
    selection: ExpertSelection | None = None,
    eval_data: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    trust_remote_code: bool = False,
    mix: str | None = None,
) -> TrainResult:
    """Fine-tune a checkpoint on chat records or texts and leave everything in a run folder.

    The folder holds ``esft_run.json`` (its marker), ``config.yaml``, ``origin.json`` (base and data, with digests),
    ``metrics.jsonl``, TensorBoard events, resumable ``checkpoints/``, a ``summary.json``, and the outcome: ``adapter/``
    for ESFT and LoRA, ``model/`` for full fine-tuning.

    Args:
        model_path: checkpoint folder or hub id.
        data: what ``DataSource.of`` reads, or several such; of chat records the loss covers assistant turns.
        out: the run folder.
        config: the settings; where None the paper's, or those of the run to resume.
        selection: the experts to train; needed by "esft" and by nothing else. A run to resume has its own.
        eval_data: one such, whose loss is measured every ``eval_every`` steps.
        resume: go on from the last checkpoint in ``out``, with the same base, data, selection and settings; only
            ``steps`` may differ, and not be fewer than are done.
        overwrite: replace a run that ``out`` holds, when this one is whole; until then it is in ``out/overwriting``.
        progress: show bars.
        trust_remote_code: whether Python files of the checkpoint may be run; no setting, so that no file can say it.
        mix: general records, as DATA:SHARE with the share of all examples that come of them.

    Raises InputError, before anything is written, for bad input of any kind, and where another process trains in
    ``out``; DivergenceError for a loss or a gradient that is no number; DiskError for a full disk; Interrupted (a
    KeyboardInterrupt) when SIGINT or SIGTERM comes: then the step was finished and a checkpoint saved.
    """
    sources, eval_source = sources_of(data), DataSource.of(eval_data) if eval_data is not None else None
    mixed = mixed_in(mix) if mix is not None else None
    check_apart(out, model_path, *(each.local for each in (*sources, eval_source, mixed) if each is not None))
    with opened(out, resume, overwrite) as folder:
        if resume:
            config, selection = folder.begun_with(config, selection)
        config = config or TrainConfig()
        config.check_selection(selection)
        reach = Reach.of(open_config(model_path, trust_remote_code))
        tokenizer = load_tokenizer(model_path, trust_remote_code)
        run_data = RunData(sources, tokenizer, reach, config, mixed).read(progress)
        held_out = run_data.held_out(eval_source, progress)
        if (report := run_data.report()) is not None:
            logger.info("%s: %s", run_data.name, report)
        torch.manual_seed(config.seed)
        source = Source(model_path, trust_remote_code, progress)
        model, base = METHODS[config.method].prepare(source, config, selection)
        use_short_attention(model)
        digests = {"model": base.digest, "data": run_data.digest()}
        if resume:
            folder.check_origin(digests, base.settings, {"model": model_path, "data": run_data.name})
        loop = _Loop(model, tokenizer, config, progress)
        state = folder.checkpoints().restore(loop.load) if resume else None
        if resume and state is None and folder.last_step() > config.save_every:
            warnings.warn(f"{folder.path}: its checkpoints are gone; the run begins at its first step", stacklevel=2)
        origin = {"model": model_path, "data": run_data.name, "base_settings": base.settings}
        folder.begin(config, origin | {"digests": digests}, selection)
        done = 0 if state is None else state.step
        measured = loop.run(folder, run_data.batches(done), held_out, done)
        METHODS[config.method].save(loop.model.eval(), tokenizer, config, base, folder)
        result = TrainResult(**measured, stored_bytes=folder.stored_bytes())
        folder.write_summary(vars(result))
    return result


class _Loop:
    """The steps of one run: batch, gradients, update, log; and now and then an evaluation and a checkpoint."""

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, config: TrainConfig, progress: bool):
        self.model, self.config, self.progress = model, config, progress
        self.pad: int = tokenizer.pad_token_id
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

    def run(
        self, folder: RunFolder, batches: Iterable[list[Example]], held_out: Sequence[Example], first: int
    ) -> dict[str, float | None]:
        """All steps after the first so many, of one batch each. Returns what ``TrainResult`` holds of them."""
        config, checkpoints = self.config, folder.checkpoints()
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        eval_loss, started = None, time.monotonic()
        self.model.train()
        bar = tqdm(total=config.steps, initial=first, desc=config.method, disable=not self.progress, unit="step")

        def save(step: int) -> None:
            self._check_weights(step)
            checkpoints.save(State(step, self.losses[-RECENT:], self.optimizer.state()))

        def leave_if_asked(step: int) -> None:
            if (number := asked()) is not None:
                save(step)
                raise Interrupted(f"{folder.path}: stopped after step {step}, which is saved", number, resumable=True)

        def evaluation(step: int) -> float | None:
            """What is due after a step; a run that was stopped may have had no time for it."""
            if not (held_out and step and (step % config.eval_every == 0 or step == config.steps)):
                return None
            if step == first:  # of the run that is resumed
                known = [m["eval_loss"] for m in folder.metrics() if m["step"] == step and "eval_loss" in m]
                if known:
                    return known[-1]
            loss = mean_loss(self.model, held_out, self.pad, self.together)
            self.model.train()
            if not math.isfinite(loss):
                raise DivergenceError(f"step {step}: loss {loss} on the evaluation data; lower the learning rate")
            log(step, eval_loss=loss)
            return loss

        with stop_signals() as asked, folder.log(first) as log, bar:
            step, eval_loss = first, evaluation(first)
            for step, records in enumerate(batches, first + 1):
                log(step, **self._step(step, records))
                bar.set_postfix(loss=f"{self._recent_loss():.3f}", refresh=False)
                bar.update()
                leave_if_asked(step)
                # Saved first: what a kill takes from the evaluation, a resumed run makes up for.
                if step % config.save_every == 0 and step != config.steps:
                    save(step)
                if (found := evaluation(step)) is not None:
                    eval_loss = found
            leave_if_asked(step)
        self._check_weights(step)
        seconds = time.monotonic() - started
        return {
            "steps": config.steps,
            "train_loss": self._recent_loss(),
            "eval_loss": eval_loss,
            "trained_parameters": trained,
            "seconds": seconds,
            "tokens_per_second": self.tokens / seconds,
            "peak_rss": peak_rss(),
            "peak_gpu_memory": peak_memory(),
        }

    def _check_weights(self, step: int) -> None:
        """Before they are stored: the gradients of the next step would show it too, but the last one has none."""
        if (name := self.optimizer.overflowed()) is not None:
            raise DivergenceError(f"step {step}: {name} holds what is no finite number; lower the learning rate")

    def _recent_loss(self) -> float:
        recent = self.losses[-RECENT:]
        return sum(recent) / len(recent)

    def _step(self, step: int, records: Sequence[Example]) -> dict[str, float]:
        """One update from one batch; ``step`` counts from 1. Returns what to log."""
        begun = time.monotonic()
        # What a model draws (dropout, jitter) depends on the step alone, so that a resumed run draws it too.
        torch.manual_seed(random.Random(f"{self.config.seed}/{step - 1}").getrandbits(63))
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
        parts = [records[i : i + self.together] for i in range(0, len(records), self.together)]
        targets = sum(record.targets for record in records)
        losses, balances = [], []
        for part in parts:
            share = len(part) / len(records)
            batch = collate([joined(part)] if self.config.padding_free else part, self.pad)
            watched = balance_losses(self.model, batch["attention_mask"]) if self.config.aux_loss else nullcontext([])
            with watched as aux:
                total, _ = batch_loss(self.model, batch)
            loss = total / targets
            losses.append(loss.detach())
            if aux:
                balance = share * torch.stack([each.to(loss.device) for each in aux]).sum()  # over several GPUs
                balances.append(balance.detach())
                loss = loss + self.config.aux_loss * balance
            loss.backward()
        extra = {"aux_loss": torch.stack(balances).sum().item()} if balances else {}
        return torch.stack(losses).sum().item(), extra

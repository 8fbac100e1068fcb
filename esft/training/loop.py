"""The training loop: one for ESFT, full fine-tuning and LoRA."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from esft.checkpoint.device import first_device, in_host_memory
from esft.checkpoint.load import load_tokenizer
from esft.checkpoint.source import Reach, open_config
from esft.data.examples import Example
from esft.data.sources import DataSource
from esft.errors import Interrupted
from esft.memory import peak_memory, peak_rss
from esft.parallel.join import joined
from esft.parallel.sharding import shard_frozen
from esft.runs.config import TrainConfig
from esft.runs.progress import Bar
from esft.runs.shared_run import SharedRun, shared_run
from esft.selection import ExpertSelection
from esft.signals import stop_signals
from esft.storage.outputs import check_apart
from esft.training.evaluations import Evaluations
from esft.training.methods import METHODS, Source
from esft.training.run_data import Data, RunData, sources_of
from esft.training.steps import Steps

logger = logging.getLogger("esft")


@dataclass(frozen=True)
class TrainResult:
    """What a run measured.

    ``peak_rss`` is the process's largest resident memory so far and ``peak_gpu_memory`` that of its tensors on the
    GPUs, in bytes, of several processes the largest; ``seconds`` is the loop's own time.
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

    Raises InputError, before anything is written, for bad input of any kind, and where another process trains in
    ``out``; DivergenceError for a loss or a gradient that is no number; DiskError for a full disk; Interrupted (a
    KeyboardInterrupt) when SIGINT or SIGTERM comes: then the step was finished and a checkpoint saved.
    """
    sources, eval_source = sources_of(data), DataSource.of(eval_data) if eval_data is not None else None
    check_apart(out, model_path, *(each.local for each in (*sources, eval_source) if each is not None))
    with joined() as ranks, shared_run(ranks, out, resume, overwrite) as run:
        if resume:
            config, selection = run.begun_with(config, selection)
        config = config or TrainConfig()
        config.check_selection(selection)
        reach = Reach.of(open_config(model_path, trust_remote_code))
        tokenizer = load_tokenizer(model_path, trust_remote_code)
        progress = progress and ranks.main
        with ranks.main_first():  # who leaves the data encoded for the others
            run_data = RunData(sources, tokenizer, reach, config).read(progress)
            held_out = run_data.held_out(eval_source, progress)
        if (report := run_data.report()) is not None:
            logger.info("%s: %s", run_data.name, report)
        torch.manual_seed(config.seed)
        source = Source(model_path, trust_remote_code, progress)
        with in_host_memory(config.shard != "none" and ranks.size > 1):
            model, base = METHODS[config.method].prepare(source, config, selection)
        digests = {"model": base.digest, "data": run_data.digest()}
        if ranks.size > 1:
            settings = {f"setting {name}": value for name, value in asdict(config).items()}
            watched = {"evaluation data": eval_source and eval_source.digest(), "selection": str(selection)}
            ranks.check_alike(settings | watched | digests)
        if resume:
            run.check_origin(digests, base.settings, {"model": model_path, "data": run_data.name})
        if config.shard == "frozen":
            shard_frozen(model, ranks, first_device())
        steps = Steps(model, tokenizer.pad_token_id, config, ranks)
        state = run.restore(steps.load) if resume else None
        if resume and state is None and run.last_step() > config.save_every:
            gone = f"{run.folder.path}: its checkpoints are gone; the run begins at its first step"
            warnings.warn(gone, stacklevel=2)
        origin = {"model": model_path, "data": run_data.name, "base_settings": base.settings}
        run.begin(config, origin | {"digests": digests}, selection)
        done = 0 if state is None else state.step
        evaluations = Evaluations(model, tokenizer.pad_token_id, config, held_out)
        measured = _train(steps, run_data.batches(done), evaluations, run, done, progress)
        method, trained = METHODS[config.method], model.eval()
        stored = run.leave(lambda folder: method.save(trained, tokenizer, config, base, folder))
        result = TrainResult(**measured, stored_bytes=stored)
        run.write_summary(vars(result))
    return result


def _train(
    steps: Steps,
    batches: Iterable[list[Example]],
    evaluations: Evaluations,
    run: SharedRun,
    first: int,
    progress: bool,
) -> dict[str, Any]:
    """All steps after the first so many, of one batch each: now and then an evaluation and a checkpoint.

    Returns what ``TrainResult`` holds of them.
    """
    config, ranks = steps.config, run.ranks
    started = time.monotonic()
    steps.model.train()

    def leave_if_asked(step: int) -> None:
        if number := ranks.largest(asked() or 0):
            run.save(steps.state(step))
            raise Interrupted(f"{run.folder.path}: stopped after step {step}, which is saved", number, resumable=True)

    with (
        stop_signals() as asked,
        run.log(first) as log,
        Bar(config.method, config.steps, first, progress) as bar,
    ):
        step = first
        # A run that was stopped may have had no time for what was due after its last step.
        if evaluations.due(first) and not evaluations.recall(first, run.metrics()):
            evaluations.measure(first, log)
        for step, records in enumerate(batches, first + 1):
            log(step, **steps.update(step, records))
            bar.step(steps.recent_loss)
            leave_if_asked(step)
            # Saved first: what a kill takes from the evaluation, a resumed run makes up for.
            if step % config.save_every == 0 and step != config.steps:
                run.save(steps.state(step))
            if evaluations.due(step):
                evaluations.measure(step, log)
        leave_if_asked(step)
    run.check_alike(steps.state(step))
    seconds = time.monotonic() - started
    return {
        "steps": config.steps,
        "train_loss": steps.recent_loss,
        "eval_loss": evaluations.loss,
        "trained_parameters": sum(p.numel() for p in steps.model.parameters() if p.requires_grad),
        "seconds": seconds,
        "tokens_per_second": steps.tokens / seconds,
        "peak_rss": ranks.largest(peak_rss()),
        "peak_gpu_memory": ranks.largest(peak_memory()),
    }

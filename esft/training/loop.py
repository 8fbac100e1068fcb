"""The training loop: one for ESFT, full fine-tuning and LoRA."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from esft.checkpoint.device import first_device, in_host_memory
from esft.checkpoint.load import load_tokenizer
from esft.checkpoint.source import Reach, open_config
from esft.data.encoding import tokenizer_digests
from esft.data.examples import Example
from esft.data.mixing import mixed_in
from esft.errors import InputError, Interrupted
from esft.experts.moe_layers import dealt_parameters, dealt_pools
from esft.memory import peak_memory, peak_rss
from esft.parallel.join import joined
from esft.parallel.sharding import shard_frozen
from esft.planning.advice import GB
from esft.planning.plan import plan
from esft.runs.config import TrainConfig
from esft.runs.metrics import evaluations as evaluations_of
from esft.runs.progress import Bar
from esft.runs.reporting import check_reporting
from esft.runs.shared_run import SharedRun, shared_run
from esft.selection import ExpertSelection
from esft.short_attention import use_short_attention
from esft.signals import stop_signals
from esft.storage.files import value_digest
from esft.storage.outputs import check_apart, check_outside
from esft.training.compiled_layers import compile_layers
from esft.training.evaluations import Evaluations, deciding
from esft.training.methods import METHODS, Source
from esft.training.run_data import Data, RunData, held_out_sources, sources_of
from esft.training.steps import Steps

logger = logging.getLogger("esft")


@dataclass(frozen=True)
class TrainResult:
    """What a run measured.

    ``steps`` are those that were done, and ``best_step`` is the one whose model was kept, None where that is the last.
    ``before`` and ``after`` hold the scores on the evaluation data by their names in the metrics, ``after`` and
    ``eval_loss`` (the first of its losses) of the model that was kept. ``peak_rss`` is the process's largest resident
    memory so far and ``peak_gpu_memory`` that of its tensors on the GPUs, in bytes, of several processes the largest;
    ``seconds`` is the loop's own time.
    """

    steps: int
    train_loss: float
    eval_loss: float | None
    before: dict[str, float]
    after: dict[str, float]
    best_step: int | None
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
    eval_data: str | Path | Mapping[str, str | Path] | None = None,
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
        eval_data: one such, or several by name, which is measured every ``eval_every`` steps.
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
    sources, held_out = sources_of(data), held_out_sources(eval_data)
    mixed = mixed_in(mix) if mix is not None else None
    read = [each.local for each in (*sources, *held_out.values(), mixed) if each is not None]
    check_apart(out, model_path, *read)
    check_outside(out, *read)
    with joined() as ranks, shared_run(ranks, out, resume, overwrite) as run:
        if resume:
            config, selection = run.begun_with(config, selection)
        config = config or TrainConfig()
        config.check_selection(selection)
        if config.kl_weight and mixed is None:
            raise InputError("kl_weight holds the model to its base on data that is mixed in, and none is: --mix")
        if config.kl_weight and config.shard != "none" and ranks.size > 1:
            # Some ranks may have nothing that is mixed in, and would not go along with the others' base.
            raise InputError(f"kl_weight does not go together with shard {config.shard} over processes")
        deciding(config, list(held_out))
        check_reporting(config.report_to)
        reach = Reach.of(open_config(model_path, trust_remote_code))
        tokenizer = load_tokenizer(model_path, trust_remote_code)
        progress = progress and ranks.main
        with ranks.main_first():  # who leaves the data encoded for the others
            run_data = RunData(sources, tokenizer, reach, config, mixed).read(progress)
            sets = run_data.eval_sets(held_out, progress)
        if (report := run_data.report()) is not None:
            logger.info("%s: %s", run_data.name, report)
        if progress and ranks.size == 1 and first_device().type == "cpu":
            logger.info(_memory(model_path, config, selection, run_data.together(), trust_remote_code))
        torch.manual_seed(config.seed)
        source = Source(model_path, trust_remote_code, progress)
        with in_host_memory(config.cuts_frozen and ranks.size > 1):
            model, base = METHODS[config.method].prepare(source, config, selection)
        digests = {"model": base.digest, "data": run_data.digest(), **tokenizer_digests(tokenizer)}
        begun = {"model": model_path, "data": run_data.name}
        if config.chooses:  # else nothing of the outcome depends on what it is evaluated on
            digests["eval_data"] = value_digest({name: source.digest() for name, source in held_out.items()})
            begun["eval_data"] = ", ".join(map(str, held_out.values()))
        if ranks.size > 1:
            settings = {f"setting {name}": value for name, value in asdict(config).items()}
            watched = {name or "evaluation data": source.digest() for name, source in held_out.items()}
            others = {"selection": str(selection), "tokenizer or chat template": run_data.encoding()}
            ranks.check_alike(settings | watched | others | digests)
        if resume:
            run.check_origin(digests, base.settings, begun)
        if config.cuts_frozen:
            shard_frozen(model, ranks, first_device(), dealt_pools(model))
        use_short_attention(model)  # where the model is to stay
        steps = Steps(model, tokenizer.pad_token_id, config, run_data.places, ranks)
        if config.compile:  # after all that tries the model out
            compile_layers(model)
        state = run.restore(steps.load) if resume else None
        if resume and state is None and run.last_step() > config.save_every:
            warnings.warn(f"{run.path}: its checkpoints are gone; the run begins at its first step", stacklevel=2)
        done, best = (0, None) if state is None else (state.step, state.best)
        recorded = evaluations_of([line for line in run.metrics() if line["step"] <= done]) if resume else {}
        run.begin(config, begun | {"base_settings": base.settings, "digests": digests}, selection, anew=not resume)
        evaluations = Evaluations(model, tokenizer, config, sets, recorded, best)
        logger.info(_about(model, config, selection, done, list(held_out)))
        measured = _train(steps, run_data.batches(done), evaluations, run, done, progress)
        method, tuned = METHODS[config.method], model.eval()
        stored = run.leave(lambda folder: method.save(tuned, tokenizer, config, base, folder))
        result = TrainResult(**measured, stored_bytes=stored)
        run.write_summary(vars(result))
    return result


def _memory(
    model_path: str,
    config: TrainConfig,
    selection: ExpertSelection | None,
    together: tuple[int, int],
    trust_remote_code: bool,
) -> str:
    """What a training on a CPU is planned to take, in a line, before minutes of loading."""
    rows, tokens = together
    try:
        found = plan(
            model_path, selection, config, frozen=config.frozen, tokens=tokens, trust_remote_code=trust_remote_code
        )
    except InputError as error:  # if a training is refused for this too, that says so
        return f"memory: not planned ({error})"
    return f"memory: {found.peak / GB:.1f} GB at the most, as planned for {tokens:,} tokens in {rows} rows together"


def _about(
    model: nn.Module, config: TrainConfig, selection: ExpertSelection | None, done: int, held_out: list[str]
) -> str:
    """What is about to be done, in a line."""
    experts = f"{selection.num_experts} experts of {len(selection.experts)} layers, " if selection is not None else ""
    left = config.steps - done
    begun = f"{left}{' more' * bool(done)} step{'s' * (left != 1)}"
    rows = "packed rows" if config.packing else "records"
    names = ", ".join(name or "evaluation data" for name in held_out)
    measured = f", {config.eval_metrics} of {names} every {config.eval_every}" if held_out else ""
    return f"{config.method}: {experts}{_trained(model):,} parameters, {begun} of {config.batch_size} {rows}{measured}"


def _trained(model: nn.Module) -> int:
    """Parameters that train, on all ranks together."""
    dealt = dealt_parameters(model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return sum(p.shape[1:].numel() * sum(dealt[n]) if n in dealt else p.numel() for n, p in trained.items())


def _train(
    steps: Steps,
    batches: Iterable[list[Example]],
    evaluations: Evaluations,
    run: SharedRun,
    first: int,
    progress: bool,
) -> dict[str, Any]:
    """All steps after the first so many, of one batch each: now and then an evaluation and a checkpoint.

    Leaves the model that is to be kept. Returns what ``TrainResult`` holds of the steps.
    """
    config, ranks = steps.config, run.ranks
    started = time.monotonic()
    steps.model.train()

    def save(step: int) -> None:
        run.save(replace(steps.state(step), best=evaluations.best))

    def leave_if_asked(step: int) -> None:
        if number := ranks.largest(asked() or 0):
            save(step)
            raise Interrupted(f"{run.path}: stopped after step {step}, which is saved", number, resumable=True)

    with (
        stop_signals() as asked,
        run.log(first) as log,
        Bar(config.method, config.steps, first, progress) as bar,
    ):
        step = first
        if evaluations.due(first):  # a run that was stopped may have had no time for it
            evaluations.after(first, log)
        for step, records in enumerate(() if evaluations.exhausted else batches, first + 1):
            log(step, **(figures := steps.update(step, records)))
            bar.step(steps.recent_loss, figures["tokens_per_second"], steps.supervised)
            leave_if_asked(step)
            # Saved first: what a kill takes from the evaluation, a resumed run makes up for.
            if step % config.save_every == 0 and step != config.steps:
                save(step)
            if evaluations.due(step):
                evaluations.after(step, log)
                if evaluations.exhausted:
                    break
                if evaluations.keeps(step) and step != config.steps:
                    save(step)
        leave_if_asked(step)
    if step != config.steps:
        patience = config.early_stopping_patience
        logger.info("ended after step %d: %s no better in %s evaluations", step, evaluations.deciding, patience)
    kept = evaluations.best.step if config.load_best_model_at_end and evaluations.best is not None else step
    if kept != step:
        steps.load_weights(run.read(kept))
        logger.info("kept step %d, the best by %s", kept, evaluations.deciding)
    run.check_alike(steps.state(kept))
    seconds = time.monotonic() - started
    after = evaluations.recorded.get(kept, {})
    return {
        "steps": step,
        "train_loss": steps.recent_loss,
        "eval_loss": next((value for name, value in after.items() if name.endswith("loss")), None),
        "before": evaluations.recorded.get(0, {}),
        "after": after,
        "best_step": kept if kept != step else None,
        "trained_parameters": _trained(steps.model),
        "seconds": seconds,
        "tokens_per_second": steps.tokens / seconds,
        "peak_rss": ranks.largest(peak_rss()),
        "peak_gpu_memory": ranks.largest(peak_memory()),
    }

"""The training loop: one for ESFT, full fine-tuning and LoRA."""

from __future__ import annotations

import hashlib
import json
import math
import random
import shutil
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from esft.adapter import save_adapter, write_manifest
from esft.balance import balance_losses
from esft.checkpoint import load_model, load_tokenizer, model_digest
from esft.config import TrainConfig
from esft.data import IGNORE, Example, collate, encode_all, epoch_batches, read_records
from esft.device import peak_memory
from esft.errors import InputError
from esft.evaluate import batch_loss, has_plain_head, mean_loss
from esft.families import moe_layers
from esft.files import check_apart, check_new_folder, new_folder, read_json, write_json
from esft.optim import MasterAdamW
from esft.select import ExpertSelection
from esft.swap import swap, unswap

CONFIG = "config.yaml"
SELECTION = "experts.json"
ORIGIN = "origin.json"
METRICS = "metrics.jsonl"
ADAPTER = "adapter"
MODEL = "model"  # of a full fine-tuning, in the place of an adapter
SUMMARY = "summary.json"


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
    data: str | Path,
    out: str | Path,
    config: TrainConfig | None = None,
    selection: ExpertSelection | None = None,
    eval_data: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> TrainResult:
    """Fine-tune a checkpoint on chat records and leave everything in a run folder.

    The folder holds ``config.yaml``, ``origin.json`` (base and data, with digests), ``metrics.jsonl``, TensorBoard
    events, resumable ``checkpoints/``, a ``summary.json``, and the outcome: ``adapter/`` for ESFT and LoRA, ``model/``
    for full fine-tuning.

    Args:
        model_path: checkpoint folder or hub id.
        data: JSONL chat records; the loss covers assistant turns.
        out: the run folder.
        config: the settings; where None the paper's, or those of the run to resume.
        selection: the experts to train; needed by "esft" and by nothing else. A run to resume has its own.
        eval_data: JSONL chat records whose loss is measured every ``eval_every`` steps.
        resume: go on from the last checkpoint in ``out``, with the same base, data, selection and settings; only
            ``steps`` may differ.
        overwrite: replace a run that ``out`` holds.

    Raises InputError, before anything is written, for bad input of any kind.
    """
    out = Path(out)
    check_apart(out, model_path, data, *([eval_data] if eval_data else []))
    _check_out(out, resume, overwrite)
    if resume:
        config, selection = _resumed(out, config, selection)
    config = config or TrainConfig()
    if (config.method == "esft") != (selection is not None):
        raise InputError(f"method {config.method} {'needs' if selection is None else 'takes no'} expert selection")
    if selection is not None and selection.is_empty:
        raise InputError("the expert selection is empty: nothing would train")
    tokenizer = load_tokenizer(model_path)
    examples = encode_all(tokenizer, read_records(data), config.max_length, data)
    held_out = encode_all(tokenizer, read_records(eval_data), config.max_length, eval_data) if eval_data else []
    torch.manual_seed(config.seed)
    model = load_model(model_path, config.dtype)
    digests = {"model": model_digest(model), "data": hashlib.sha256(Path(data).read_bytes()).hexdigest()}
    if resume:
        begun = read_json(out / ORIGIN)["digests"]
        for name, path in (("model", model_path), ("data", data)):
            if begun[name] != digests[name]:
                raise InputError(f"cannot resume with {name} {path}: the run was begun with another")
    run = _Run(prepare(model, config, selection), tokenizer, config, out, digests["model"], progress)
    if overwrite and out.exists():
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    config.save(out / CONFIG)
    origin = {"model": model_path, "data": str(data)}
    write_json(out / ORIGIN, origin | {"digests": digests})
    if selection is not None:
        selection.save(out / SELECTION)
    result = run.run(examples, held_out, resume)
    write_json(out / SUMMARY, {"method": config.method, **origin, **vars(result)})
    return result


def _resumed(
    out: Path, config: TrainConfig | None, selection: ExpertSelection | None
) -> tuple[TrainConfig, ExpertSelection | None]:
    """The settings and the selection of the run in ``out``. Raises InputError where the given ones differ."""
    begun = TrainConfig.load(out / CONFIG)
    if config is not None:
        config.check_resumes(begun)
    chosen = ExpertSelection.load(out / SELECTION) if (out / SELECTION).is_file() else None
    if selection is not None and selection != chosen:
        raise InputError(f"cannot resume with another expert selection than {out / SELECTION}")
    return config or begun, chosen


def prepare(model: PreTrainedModel, config: TrainConfig, selection: ExpertSelection | None) -> nn.Module:
    """The model with exactly what the method trains requiring gradients."""
    if config.recompute == "layers":
        try:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        except ValueError as error:
            raise InputError(f"recompute layers: {error}") from error
    if config.method == "lora":
        return _add_lora(model, config)
    if selection is None:  # full: every expert through the same kernels, and all the rest
        everything = {layer.index: list(range(layer.num_experts)) for layer in moe_layers(model)}
        selection = ExpertSelection(everything, shared_experts=True, non_expert_modules=True)
    return swap(model, selection, config.backend, "frozen" if config.recompute == "frozen" else "none")


def _add_lora(model: PreTrainedModel, config: TrainConfig) -> nn.Module:
    try:
        from peft import LoraConfig, get_peft_model
    except ModuleNotFoundError as error:
        raise InputError("method lora needs the peft package: pip install 'esft[lora]'") from error
    # Every linear layer of the blocks, and the stacked experts, which are no linear layers to PEFT.
    experts = [layer.name for layer in moe_layers(model)]
    head = model.get_output_embeddings()
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head]
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        target_modules=linear,
        target_parameters=[f"{name}.{p}" for name in experts for p in ("gate_up_proj", "down_proj")],
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, lora)


def _check_out(out: Path, resume: bool, overwrite: bool) -> None:
    if resume and overwrite:
        raise InputError("resume and overwrite exclude each other")
    if resume and not ((out / CONFIG).is_file() and (out / ORIGIN).is_file()):
        raise InputError(f"{out}: holds no run to resume")
    check_new_folder(out, overwrite=resume or overwrite)
    if overwrite and out.exists() and any(out.iterdir()) and not (out / CONFIG).is_file():
        raise InputError(f"{out}: holds no run, and is not overwritten")


class _Run:
    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        config: TrainConfig,
        out: Path,
        base_digest: str,
        progress: bool,
    ):
        self.model, self.tokenizer, self.config, self.out, self.progress = model, tokenizer, config, out, progress
        self.base_digest = base_digest
        self.pad: int = tokenizer.pad_token_id
        self.together = config.micro_batch_size or config.batch_size
        self.optimizer = MasterAdamW(model.named_parameters(), config)
        self.checkpoints = out / "checkpoints"
        has_plain_head(model)  # tries the model out the first time, which a step that watches its routers cannot have

    def run(self, examples: Sequence[Example], held_out: Sequence[Example], resume: bool) -> TrainResult:
        config, first = self.config, self._resume() if resume else 0
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        losses, tokens, eval_loss, started = [], 0, None, time.monotonic()
        self.model.train()
        per_epoch = math.ceil(len(examples) / config.batch_size)
        with (
            open(self.out / METRICS, "a", encoding="utf-8") as metrics,
            SummaryWriter(str(self.out / "tensorboard"), purge_step=first) as board,
            tqdm(total=config.steps, initial=first, desc=config.method, disable=not self.progress, unit="step") as bar,
        ):

            def log(step: int, **values: float) -> None:
                print(json.dumps({"step": step, **values}), file=metrics, flush=True)
                for name, value in values.items():
                    board.add_scalar(name, value, step)

            batches: list[list[int]] = []
            for step in range(first, config.steps):
                epoch, place = divmod(step, per_epoch)
                if not batches or place == 0:
                    batches = epoch_batches(examples, config.batch_size, config.seed, epoch)
                records = [examples[i] for i in batches[place]]
                begun = time.monotonic()
                # What a model draws (dropout, jitter) depends on the step alone, so that a resumed run draws it too.
                torch.manual_seed(random.Random(f"{config.seed}/{step}").getrandbits(63))
                loss, extra = self._backward(records)
                rate = config.rate(step)
                norm = self.optimizer.step(rate)
                count = sum(len(record.ids) for record in records)
                tokens += count
                if not math.isfinite(loss) or not math.isfinite(norm):
                    raise InputError(f"step {step + 1}: loss {loss}, gradient norm {norm}; lower the learning rate")
                losses.append(loss)
                speed = count / (time.monotonic() - begun)
                log(step + 1, loss=loss, **extra, lr=rate, grad_norm=norm, tokens_per_second=speed)
                bar.set_postfix(loss=f"{sum(losses[-20:]) / len(losses[-20:]):.3f}", refresh=False)
                bar.update()
                last = step + 1 == config.steps
                if held_out and ((step + 1) % config.eval_every == 0 or last):
                    eval_loss = mean_loss(self.model, held_out, self.pad, self.together)
                    self.model.train()
                    log(step + 1, eval_loss=eval_loss)
                if (step + 1) % config.save_every == 0 and not last:
                    self._save(step + 1)
        seconds = time.monotonic() - started
        stored = self._store()
        recent = losses[-20:] or [math.nan]
        return TrainResult(
            steps=config.steps,
            train_loss=sum(recent) / len(recent),
            eval_loss=eval_loss,
            trained_parameters=trained,
            stored_bytes=sum(f.stat().st_size for f in stored.rglob("*.safetensors")),
            seconds=seconds,
            tokens_per_second=tokens / seconds,
            peak_rss=peak_rss(),
            peak_gpu_memory=peak_memory(),
        )

    def _backward(self, records: Sequence[Example]) -> tuple[float, dict[str, float]]:
        """Gradients of one batch. Returns the mean cross entropy of its supervised tokens, and what else to log."""
        parts = [records[i : i + self.together] for i in range(0, len(records), self.together)]
        targets = sum(label != IGNORE for record in records for label in record.labels[1:])
        losses, balances = [], []
        for part in parts:
            batch, share = collate(part, self.pad), len(part) / len(records)
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

    def _save(self, step: int) -> None:
        """A resumable checkpoint; the one before it goes when this one is whole."""
        name = f"step-{step:06d}"
        with new_folder(self.checkpoints / name, overwrite=True) as folder:
            save_file({n: t.contiguous() for n, t in self.optimizer.state().items()}, folder / "state.safetensors")
            write_json(folder / "state.json", {"step": step})
        for old in self.checkpoints.glob("step-*"):
            if old.name < name:
                shutil.rmtree(old)

    def _resume(self) -> int:
        found, step = sorted(self.checkpoints.glob("step-*")), 0
        if found:
            self.optimizer.load_state(load_file(found[-1] / "state.safetensors"))
            step = read_json(found[-1] / "state.json")["step"]
        # What the broken run logged after its last checkpoint happens again, and its last line may be torn.
        metrics = self.out / METRICS
        lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else []
        metrics.write_text("".join(line + "\n" for line in lines if _logged_by(line, step)), encoding="utf-8")
        return step

    def _store(self) -> Path:
        """Write what was trained, and return where."""
        self.model.eval()
        model: Any = self.model
        if self.config.method == "esft":
            return save_adapter(model, self.out / ADAPTER, overwrite=True)
        folder = self.out / (ADAPTER if self.config.method == "lora" else MODEL)
        with new_folder(folder, overwrite=True) as temporary:
            if self.config.method == "lora":
                model.save_pretrained(temporary)
                write_manifest(
                    temporary, model.get_base_model(), self.base_digest, {"lora_rank": self.config.lora_rank}
                )
            else:
                unswap(model).save_pretrained(temporary)
                self.tokenizer.save_pretrained(temporary)
        return folder


def _logged_by(line: str, step: int) -> bool:
    try:
        return json.loads(line)["step"] <= step
    except json.JSONDecodeError:
        return False


def peak_rss() -> int:
    """The process's largest resident memory so far, bytes; 0 where the system does not tell."""
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    import sys

    return peak if sys.platform == "darwin" else peak * 1024

"""Whole training steps of models of true size on one GPU, beside what others would pick; scoring and generating, too.

A model is made where it is computed, of its configuration in ``benchmarks/models``, with the random weights that
transformers gives it: nothing is read from a disk. Every part makes its own, and frees it. Before a peer is timed, its
loss on the untrained model must be that of the stock model, and memory that does not reach is a result like others.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import esft
from benchmarks.dense import dense_rate, flops_per_token
from benchmarks.gpu import Rows
from benchmarks.layer import interleaved, synchronise
from benchmarks.roofline import GPUS
from benchmarks.step import SUPERVISED, Batch, Trainer, chosen_experts, make_batch, ours, settings, stock
from esft.checkpoint.load import load_skeleton
from esft.checkpoint.source import open_config
from esft.errors import asked_for
from esft.evaluation.loss import predictions
from esft.experts.model_state import Base
from esft.experts.moe_layers import moe_layers
from esft.optimizer.masters import master_type
from esft.optimizer.moments import MOMENTS
from esft.runs.config import TrainConfig
from esft.scoring.score import score_experts
from esft.selection import ExpertSelection
from esft.swapping import swap as swapping
from esft.training.methods import Source

SEQUENCES, LENGTH = (1, 4), 2048  # of a step, and tokens of each
PROMPT, NEW = 128, 32  # tokens of what is generated
GENERATED = (1, 32)  # sequences
DENSE_SIZE, DENSE_SECONDS = 8192, 0.5  # of the products that the GPU's dense rate is measured with
TOLERANCE = 0.02  # of the loss
GB = 1e9
FULL_BYTES = 2 + 2 + 4  # a parameter: weight, gradient and both moments in bf16

OURS = {
    "esft": settings(),
    "esft, frozen in nf4": settings(frozen="nf4"),
    "esft, 8-bit moments, recompute layers": settings(optimizer="adamw_8bit", recompute="layers"),
    "esft, recompute frozen": settings(recompute="frozen"),
    "esft, recompute layers": settings(recompute="layers"),
    "esft, everything trained": settings("full"),
    "esft, layers compiled": settings(compile=True),
}
STOCK: dict[str, Callable[[Any], Trainer]] = {
    "transformers grouped_mm, full": lambda model: stock(model, "grouped_mm"),
    "PEFT LoRA on the experts, grouped_mm": lambda model: stock(model, "grouped_mm", lora=True),
    "transformers eager, full": lambda model: stock(model, "eager"),
}
# In this order, each stage with all models: what tells most comes first, and what takes long to begin last.
STAGES = (
    ("esft", "transformers grouped_mm, full", "esft, frozen in nf4", "PEFT LoRA on the experts, grouped_mm"),
    ("esft, 8-bit moments, recompute layers", "esft, recompute frozen", "esft, recompute layers"),
    ("esft, everything trained", "transformers eager, full"),
    (USE := "scoring and generating",),
    ("esft, layers compiled",),
    (PLANS := "memory, computed",),
)
ONLY = {"transformers eager, full": "olmoe-1b-7b"}  # the model that is timed with it: it takes long


@dataclass(frozen=True)
class Made(Source):
    """A model that is there already, in the place of a checkpoint's; ``path`` is of its configuration."""

    model: PreTrainedModel | None = None

    def stock(self, config: TrainConfig) -> PreTrainedModel:
        assert self.model is not None
        return self.model

    def swapped(self, config: TrainConfig, selection: ExpertSelection) -> PreTrainedModel:
        recompute = "frozen" if config.recompute == "frozen" else "none"
        frozen = "bf16" if config.frozen == "auto" else config.frozen
        # A digest would have all weights read back from the GPU.
        with mock.patch.object(swapping, "model_base", lambda model: Base("random", "", model.dtype, {})):
            return swapping.swap(self.stock(config), selection, config.backend, recompute, frozen)


def make_model(path: str, device: torch.device) -> PreTrainedModel:
    """The stock model in bf16 with random weights, the same every time."""
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(open_config(path), dtype=torch.bfloat16, attn_implementation="sdpa")
    model.set_experts_implementation("grouped_mm")
    return model.eval()


def free(device: torch.device) -> None:
    """Give back what the last model took."""
    torch.compiler.reset()  # what is compiled holds on to the layers
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak(device: torch.device) -> float | str:
    """GB that tensors took since the last ``free``."""
    return torch.cuda.max_memory_allocated(device) / GB if device.type == "cuda" else ""


@cache
def rate_of(device: torch.device) -> float:
    """Measured FLOPs a second of large dense products."""
    return dense_rate(DENSE_SIZE, DENSE_SECONDS, device)


def at_least(path: str, peer: str) -> int:
    """Bytes of weights, gradients and optimizer, before any activation; 0 where they are not known."""
    model = load_skeleton(path)
    parameters = sum(p.numel() for p in model.parameters())
    if peer in STOCK:
        return FULL_BYTES * parameters if peer.endswith("full") else 0
    config, chosen = OURS[peer], chosen_experts(path).experts
    experts = {layer.index: sum(w.numel() for w in layer.weights(0).values()) for layer in moe_layers(model)}
    trained = parameters if config.method == "full" else sum(len(chosen[i]) * size for i, size in experts.items())
    beside = 2 + master_type(torch.bfloat16).bytes_beside(torch.bfloat16)  # and the gradient
    weights = 2 * parameters if config.frozen == "auto" else 0
    return weights + beside * trained + MOMENTS[config.optimizer].count_bytes(trained)


def outlook(model: Any, batch: Batch) -> tuple[float, Tensor]:
    """The loss, and the last hidden states [N, D] at the supervised positions."""
    predicted = predictions(model, batch)
    loss = predicted.cross_entropy() / len(predicted.labels_N)
    return loss.item(), predicted.hidden_ND.detach()


def time_steps(path: str, peer: str, device: torch.device, rounds: int, memory: float, name: str) -> Rows:
    """A row for each of ``SEQUENCES``: the median step, its memory, and what it reaches of what the GPU could do.

    The FLOPs are those of our step with ``chosen_experts``, for every peer.

    Args:
        path: folder of a configuration.
        peer: of ``OURS`` or ``STOCK``.
        rounds: steps that are timed, after two that are not.
        memory: bytes of the device; where weights, gradients and optimizer take more, nothing is tried.
        name: of the device, for its peak.

    Raises RuntimeError where the loss of the untrained model is not the stock model's.
    """
    free(device)
    if (needed := at_least(path, peer)) > memory:
        why = f"does not fit: {needed / GB:.0f} GB of weights, gradients and optimizer (computed)"
        return [_row(peer, sequences, remark=why) for sequences in SEQUENCES]
    rows: Rows = []
    try:
        _steps(rows, path, peer, device, rounds, name)
    except torch.OutOfMemoryError as error:
        why = f"out of memory at {peak(device):.1f} GB, {(asked_for(error) or 0) / GB:.2f} GB more were asked for"
        rows += [_row(peer, sequences, remark=why) for sequences in SEQUENCES[len(rows) :]]
    free(device)  # now that no frame holds the model
    return rows


def _steps(rows: Rows, path: str, peer: str, device: torch.device, rounds: int, name: str) -> None:
    """Add the rows one by one, so that those before one that breaks off are there."""
    rate = rate_of(device)
    batches = {n: make_batch(open_config(path).get_text_config().vocab_size, n, LENGTH) for n in SEQUENCES}
    model = make_model(path, device)
    with torch.no_grad():
        loss, hidden_ND = outlook(model, batches[SEQUENCES[0]])
    trainer = STOCK[peer](model) if peer in STOCK else ours(Made(path, model=model), OURS[peer])
    del model
    # With gradients, as in a step: for another way through, layers would be compiled once more.
    found, found_ND = outlook(trainer.model, batches[SEQUENCES[0]])
    if not abs(found - loss) <= TOLERANCE * loss:
        raise RuntimeError(f"{peer}: loss {found:.4f} where the stock model has {loss:.4f}; not timed")
    off = ((found_ND - hidden_ND).float().norm() / hidden_ND.float().norm()).item()
    del hidden_ND, found_ND
    per_token = flops_per_token(path, chosen_experts(path), SUPERVISED)
    for sequences, batch in batches.items():
        gc.collect()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        seconds = interleaved({peer: partial(trainer.step, batch)}, rounds, device, ahead=False)[peer]
        low, middle, high = statistics.quantiles(seconds, n=4)
        flops = sequences * LENGTH * per_token / middle
        known = next((gpu.flops for key, gpu in GPUS.items() if key in name), None)
        rows.append(
            _row(peer, sequences)
            | {
                "tokens/s": round(sequences * LENGTH / middle),
                "ms": middle * 1e3,
                "quartiles": f"{low * 1e3:.1f}-{high * 1e3:.1f}",
                "forward, backward, update": ", ".join(f"{part * 1e3:.1f}" for part in _parts(trainer, batch, device)),
                "peak GB": peak(device),
                "of peak": f"{flops / known:.1%}" if known else "",
                "of dense": f"{flops / rate:.1%}",
                "hidden states off": off,
            }
        )


def _parts(trainer: Trainer, batch: Batch, device: torch.device) -> list[float]:
    """Seconds of forward, backward and update, each waited for: medians of three steps."""
    found = []
    for _ in range(3):
        moments, loss = [], None
        for part in range(4):
            synchronise(device)
            moments.append(time.perf_counter())
            if part == 0:
                loss = trainer.loss(batch)
            elif part == 1 and loss is not None:
                loss.backward()
            elif part == 2:
                trainer.update()
        found.append([after - before for before, after in pairwise(moments)])
    return [statistics.median(part) for part in zip(*found, strict=True)]


COLUMNS = (
    "tokens/s", "ms", "quartiles", "forward, backward, update", "peak GB", "of peak", "of dense", "hidden states off"
)  # fmt: skip


def _row(peer: str, sequences: int, remark: str = "") -> dict:
    return {"peer": peer, "sequences": sequences, **dict.fromkeys(COLUMNS, ""), "remark": remark}


def memory_planned(path: str) -> Rows:
    """What ``esft.plan`` computes of our steps' memory, without Python and the libraries: no measurement."""
    rows = []
    for peer, config in OURS.items():
        selection = chosen_experts(path) if config.method == "esft" else None
        frozen = "bf16" if config.frozen == "auto" else config.frozen
        for sequences in SEQUENCES:
            of_step = replace(config, batch_size=sequences)
            plan = esft.plan(path, selection, of_step, frozen=frozen, tokens=sequences * LENGTH)
            rows.append({"peer": peer, "sequences": sequences, "planned GB": (plan.peak - plan.base) / GB})
    return rows


def time_use(path: str, device: torch.device) -> Rows:
    """Tokens a second of scoring the experts and of generating: of the swapped model, and of the stock one."""
    free(device)
    model = make_model(path, device)
    batch = make_batch(open_config(path).get_text_config().vocab_size, SEQUENCES[-1], LENGTH)
    tasks = {f"scoring, {SEQUENCES[-1]} x {LENGTH:,} tokens": lambda: _score(model, batch)}
    for sequences in GENERATED:
        prompt = make_batch(open_config(path).get_text_config().vocab_size, sequences, PROMPT)["input_ids"].to(device)
        tasks[f"generating, {sequences} x {NEW} tokens"] = lambda prompt=prompt: _generate(model, prompt)
    stock_speeds = {name: _speed(task, device) for name, task in tasks.items()}
    Made(path, model=model).swapped(settings(), chosen_experts(path))  # in place
    speeds = {name: _speed(task, device) for name, task in tasks.items()}
    return [{"what": name, "esft tokens/s": speeds[name], "grouped_mm tokens/s": stock_speeds[name]} for name in tasks]


def _speed(task: Callable[[], int], device: torch.device) -> float:
    """Tokens a second of the better of two, after one that warms up."""
    speeds = []
    for _ in range(3):
        synchronise(device)
        begun = time.perf_counter()
        tokens = task()
        synchronise(device)
        speeds.append(tokens / (time.perf_counter() - begun))
    return max(speeds[1:])


def _score(model: PreTrainedModel, batch: Batch) -> int:
    score_experts(model, [{name: batch[name] for name in ("input_ids", "attention_mask")}])
    return batch["input_ids"].numel()


def _generate(model: Any, prompt: Tensor) -> int:
    found = model.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW, min_new_tokens=NEW,
        do_sample=False, pad_token_id=0,
    )  # fmt: skip
    return found.numel() - prompt.numel()


def parts(
    paths: list[Path], device: torch.device, rounds: int, memory: float, name: str
) -> dict[str, Callable[[], Rows]]:
    """What there is to do, by name, stage after stage."""
    made: dict[str, Callable[[], Rows]] = {}
    for stage in STAGES:
        for path in paths:
            for what in stage:
                if what == USE:
                    part = partial(time_use, str(path), device)
                elif what == PLANS:
                    part = partial(memory_planned, str(path))
                else:
                    part = partial(time_steps, str(path), what, device, rounds, memory, name)
                if ONLY.get(what, path.name) == path.name:
                    made[f"{path.name}: {what}"] = part
    return made

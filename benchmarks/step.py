"""Time whole training steps of a small model (forward, loss, backward, optimizer) beside what others would pick.

Every step gets the same batch of token ids, with the loss on the same positions, the model in bf16, and AdamW with
betas 0.9 and 0.95. Before anything is timed, the losses of the untrained models must agree.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import esft
from benchmarks.dense import dense_products, flops_per_token
from benchmarks.layer import interleaved
from esft.checkpoint.load import load_model, load_skeleton
from esft.data.examples import IGNORE
from esft.evaluation.loss import batch_loss
from esft.experts.moe_layers import moe_layers
from esft.optimizer.adamw import MasterAdamW
from esft.runs.config import TrainConfig
from esft.short_attention import use_short_attention
from esft.training.compiled_layers import compile_layers
from esft.training.methods import METHODS, Source

Batch = dict[str, Tensor]  # token ids and labels in the CPU's memory

RATE = 1e-6  # small enough that a model timed for long stays what it was
TRAINED_SHARE = 5 / 64  # of the experts, as published
SUPERVISED = 0.35  # share of a record's tokens in assistant turns, as in the examples' task
DENSE = "the FLOPs of our step, as one dense product"
BACKENDS = ("eager", "batched_mm", "grouped_mm")  # of transformers


@dataclass(frozen=True)
class Trainer:
    """A model and the two halves of its step."""

    model: nn.Module
    loss: Callable[[Batch], Tensor]
    update: Callable[[], object]

    def step(self, batch: Batch) -> float:
        loss = self.loss(batch)
        loss.backward()
        self.update()
        return loss.item()


def make_batch(vocabulary: int, records: int, length: int) -> Batch:
    """Random ids [B, L]; the last ``SUPERVISED`` of every row carry labels, as an answer does."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, vocabulary, (records, length), generator=generator)
    labels = ids.clone()
    labels[:, : round(length * (1 - SUPERVISED))] = IGNORE
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def chosen_experts(path: str) -> esft.ExpertSelection:
    """As many experts a layer as the published selections choose."""
    layers = moe_layers(load_skeleton(path))
    return esft.ExpertSelection({m.index: list(range(max(1, round(TRAINED_SHARE * m.num_experts)))) for m in layers})


def settings(method: str = "esft", **others: Any) -> TrainConfig:
    """Those of every step that is timed."""
    return TrainConfig(method=method, lr=RATE, dtype="bfloat16", **others)


def ours(source: Source, config: TrainConfig) -> Trainer:
    """Our training loop's step; with method "esft" it is ``chosen_experts`` that train."""
    selection = chosen_experts(source.path) if config.method == "esft" else None
    model, _ = METHODS[config.method].prepare(source, config, selection)
    use_short_attention(model.train())
    if config.compile:
        compile_layers(model)
    optimizer = MasterAdamW(model.named_parameters(), config)

    def loss(batch: Batch) -> Tensor:
        total, count = batch_loss(model, batch)
        return total / count

    return Trainer(model, loss, lambda: optimizer.step(RATE))


def stock(model: Any, implementation: str, lora: bool = False) -> Trainer:
    """transformers' model with its own loss and PyTorch's fused AdamW on bf16: everything trained, or LoRA by PEFT."""
    model.set_experts_implementation(implementation)
    device = model.device
    if lora:
        from peft import LoraConfig, get_peft_model

        names = [f"{layer.name}.{p}" for layer in moe_layers(model) for p in ("gate_up_proj", "down_proj")]
        model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_parameters=names))
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, betas=(0.9, 0.95), fused=True)

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def loss(batch: Batch) -> Tensor:
        return model(**{name: tensor.to(device) for name, tensor in batch.items()}, use_cache=False).loss

    return Trainer(model, loss, update)


def peers_of(path: str) -> dict[str, Callable[[], Trainer]]:
    made: dict[str, Callable[[], Trainer]] = {
        "esft, layers compiled": lambda: ours(Source(path), settings(compile=True)),
        "esft, everything trained": lambda: ours(Source(path), settings("full")),
    }
    for name in BACKENDS:
        made[f"transformers {name}, full"] = lambda name=name: stock(load_model(path, "bfloat16"), name)
    made["PEFT LoRA on the experts, grouped_mm"] = lambda: stock(load_model(path, "bfloat16"), "grouped_mm", lora=True)
    return made


def run(path: str, records: int, length: int, rounds: int, only: set[str] | None = None) -> list[dict]:
    """A row for every peer, one at a time beside our step: tokens a second of both, and how many times the peer's time
    is ours. Measured where ``load_model`` puts the model.

    Raises RuntimeError when a peer's loss on the untrained model is not ours.
    """
    model = load_model(path)
    batch, device = make_batch(model.config.vocab_size, records, length), model.device
    del model
    mine, tokens = ours(Source(path), settings()), batch["input_ids"].numel()
    first, rows = mine.loss(batch).item(), []

    def timed(name: str, step: Callable[[], object]) -> None:
        seconds = interleaved({"esft": partial(mine.step, batch), name: step}, rounds, device, ahead=False)
        ratios = [b / a for a, b in zip(*seconds.values(), strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4)
        speeds = [tokens / statistics.median(values) for values in seconds.values()]
        rows.append(
            {
                "peer": name,
                "peer tokens/s": round(speeds[1]),
                "esft tokens/s": round(speeds[0]),
                "peer / esft time": statistics.median(ratios),
                "quartiles": f"{low:.2f}-{high:.2f}",
            }
        )

    for name, make in peers_of(path).items():
        if only is not None and name not in only:
            continue
        peer = make()
        if not abs((theirs := peer.loss(batch).item()) - first) <= 0.02 * first:
            raise RuntimeError(f"{name}: loss {theirs:.4f} where esft has {first:.4f}; not timed")
        timed(name, partial(peer.step, batch))
    if only is None or DENSE in only:
        timed(DENSE, dense_products(tokens * flops_per_token(path, chosen_experts(path), SUPERVISED), device))
    return rows

"""What a step's products would take if they were dense: the limit that a step is held to."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from benchmarks.layer import synchronise
from esft.checkpoint.load import load_skeleton
from esft.experts.moe_layers import moe_layers
from esft.selection import ExpertSelection

CPU = torch.device("cpu")
SIZE = 2048  # rows and columns of the products


def flops_per_token(path: str, selection: ExpertSelection, supervised: float = 1.0) -> float:
    """Of a training step: two for each weight that a token meets, in the forward and in the backward, and two for each
    trained one's gradient, shared experts included. Attention's own products are left out.

    Args:
        path: of the checkpoint.
        selection: what trains.
        supervised: share of the tokens that the head sees.
    """
    model = load_skeleton(path)
    layers = {layer.index: layer for layer in moe_layers(model)}
    config = model.config.get_text_config()
    head = model.lm_head.weight
    outside = {id(weight): weight.numel() for weight in (model.get_input_embeddings().weight, head)}  # one where tied
    others = sum(p.numel() for p in model.parameters()) - sum(outside.values())
    others -= sum(p.numel() for layer in layers.values() for p in layer.parameters)
    expert = {index: sum(w.numel() for w in layer.weights(0).values()) for index, layer in layers.items()}
    active = sum(size * config.num_experts_per_tok for size in expert.values())
    trained = sum(
        size * config.num_experts_per_tok * len(selection.experts.get(index, [])) / layers[index].num_experts
        for index, size in expert.items()
    )
    if selection.shared_experts:
        shared = [each for layer in layers.values() for each in layer.shared_experts]
        trained += sum(p.numel() for each in shared for p in each.parameters())
    return 2 * (2 * (others + active + supervised * head.numel()) + trained)


def dense_rate(size: int = SIZE, seconds: float = 2.0, device: torch.device = CPU) -> float:
    """FLOPs a second of square bf16 products, the median of some."""
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    together = 1 if device.type == "cpu" else 20  # between single ones a GPU would wait for the host
    out, rates, begun = torch.empty_like(a), [], time.monotonic()
    synchronise(device)
    while time.monotonic() - begun < seconds:
        start = time.monotonic()
        for _ in range(together):
            torch.mm(a, b, out=out)
        synchronise(device)
        rates.append(together * 2 * size**3 / (time.monotonic() - start))
    return sorted(rates)[len(rates) // 2]


def dense_products(flops: float, device: torch.device) -> Callable[[], object]:
    """Something that computes so many FLOPs in one bf16 product of ``SIZE`` columns and as many rows as it takes."""
    rows = max(1, round(flops / (2 * SIZE * SIZE)))
    a, b = (torch.randn(n, SIZE, device=device).bfloat16() for n in (rows, SIZE))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)

"""Layer shapes of well-known models, and routings to run them on. Shared by benchmarks and tests."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LayerShape:
    """One MoE layer: hidden size D, expert size F, E routed experts, K per token."""

    name: str
    hidden: int
    intermediate: int
    experts: int
    top_k: int

    def flops(self, tokens: int, trained_rows: int) -> int:
        """Matrix FLOPs of forward and backward: 6DF per row forward, 6DF for the input gradients of every row, and 6DF
        for the weight gradients of the rows on trained experts."""
        rows = tokens * self.top_k
        return 6 * self.hidden * self.intermediate * (2 * rows + trained_rows)


SHAPES = {
    shape.name: shape
    for shape in (
        LayerShape("tiny", 256, 64, 32, 4),
        LayerShape("deepseek-v2-lite", 2048, 1408, 64, 6),
        LayerShape("qwen3-30b-a3b", 2048, 768, 128, 8),
        LayerShape("olmoe-1b-7b", 2048, 1024, 64, 8),
        LayerShape("mixtral-8x7b", 4096, 14336, 8, 2),
    )
}


def skewed_top_k(shape: LayerShape, tokens: int, trained: list[int], share: float, generator) -> Tensor:
    """Distinct experts per token, int64 [T, K], with about ``share`` of all rows on the trained experts.

    Experts are drawn without replacement by Gumbel noise; the trained ones' weight is found by bisection. A choice of
    the benchmark: published routing statistics give such shares, not the joint distribution.
    """
    noise = -torch.log(-torch.log(torch.rand(tokens, shape.experts, generator=generator).clamp(1e-9, 1 - 1e-9)))
    is_trained = torch.zeros(shape.experts, dtype=torch.bool)
    is_trained[trained] = True
    low, high = -20.0, 20.0
    index = noise.topk(shape.top_k).indices
    for _ in range(30):
        bias = (low + high) / 2
        index = (noise + bias * is_trained).topk(shape.top_k).indices
        low, high = (bias, high) if is_trained[index].float().mean() < share else (low, bias)
    return index

"""Layer shapes of well-known models, and routings to run them on. Shared by benchmarks and tests."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from esft_kernels.activation import Activation


@dataclass(frozen=True)
class LayerShape:
    """One MoE layer: hidden size D, expert size F, E routed experts, K per token, and how its weights are stored."""

    name: str
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    activation: Activation = Activation()
    gpt_oss_layout: bool = False  # transposed, gate and up in turn, with biases

    @property
    def expert_size(self) -> int:
        """Weights of one expert, without biases."""
        return (self.activation.width + 1) * self.hidden * self.intermediate

    def flops(self, tokens: int, trained_rows: int) -> int:
        """Matrix FLOPs of forward and backward: 2 per weight and row forward, as many for the input gradients of every
        row, and as many for the weight gradients of the rows on trained experts."""
        return 2 * self.expert_size * (2 * tokens * self.top_k + trained_rows)


GPT_OSS = Activation(slope=1.702, limit=7.0, up_offset=1.0)
# Sizes from the models' published configurations.
SHAPES = {
    shape.name: shape
    for shape in (
        LayerShape("tiny", 256, 64, 32, 4),
        LayerShape("odd", 100, 36, 7, 2),  # sizes that no vector load divides
        LayerShape("deepseek-v2-lite", 2048, 1408, 64, 6),
        LayerShape("deepseek-v2", 5120, 1536, 160, 6),
        LayerShape("deepseek-v3", 7168, 2048, 256, 8),
        LayerShape("moonlight-16b", 2048, 1408, 64, 6),
        LayerShape("qwen3-30b-a3b", 2048, 768, 128, 8),
        LayerShape("qwen3-235b-a22b", 4096, 1536, 128, 8),
        LayerShape("olmoe-1b-7b", 2048, 1024, 64, 8),
        LayerShape("mixtral-8x7b", 4096, 14336, 8, 2),
        LayerShape("gpt-oss-20b", 2880, 2880, 32, 4, GPT_OSS, gpt_oss_layout=True),
        LayerShape("glm-4.5-air", 4096, 1408, 128, 8),
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

"""The MoE modules, for use outside transformers."""

from esft.experts.deepseek_moe import DeepSeekMoE, GatedMLP, Router, RouterConfig
from esft.experts.pooled_experts import Experts

__all__ = ["DeepSeekMoE", "Experts", "GatedMLP", "Router", "RouterConfig"]

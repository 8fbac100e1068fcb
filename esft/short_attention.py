"""Attention over short rows on a CPU, for training.

PyTorch's fused attention is made for long rows. On a CPU its backward takes two to four times the time of plain matrix
products where rows have up to 512 tokens (docs/performance.md), and that of a small model is a fifth of the step. The
plain way would keep a matrix of every two tokens for each head and layer; here it is made again in the backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface

from esft.transformers_internals import (
    eager_mask,
    has_fused_attention,
    plain_attention,
    sdpa_attention_forward,
    sdpa_mask,
)

NAME = "esft_short_rows"  # among transformers' attention implementations
LONGEST = 512  # tokens of a row; at 2,048 the fused one is as fast and makes nothing again


def use_short_attention(model: nn.Module) -> None:
    """Let a model whose attention is PyTorch's fused one compute short rows otherwise while it is trained on a CPU.

    Rows beyond ``LONGEST``, forwards without a backward, and models with an attention of their own stay as they are.
    The outcome differs by rounding only.
    """
    causal_lm: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    if causal_lm.device.type == "cpu" and has_fused_attention(causal_lm):
        causal_lm.set_attn_implementation(NAME)


def _mask(*, q_length: int, **options: Any) -> Tensor | None:
    """Added to the scores [B, 1, L, L] where attention is plain; transformers' own for the fused one elsewhere."""
    return (eager_mask if _short(q_length) else sdpa_mask)(q_length=q_length, **options)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """The model's own plain attention, made again in the backward; the fused one where that is not for it.

    Args:
        query, key, value: [B, heads, L, head size], of keys and values perhaps fewer heads.
        attention_mask: as ``_mask`` makes it.
    """
    plain = plain_attention(module)
    masked = attention_mask is not None and attention_mask.dtype != torch.bool
    if plain is None or not masked or not _short(query.shape[2]):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    out: Any = checkpoint(plain, module, query, key, value, attention_mask, use_reentrant=False, **options)
    return out[0], None


def _short(length: int) -> bool:
    return torch.is_grad_enabled() and length <= LONGEST


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)

"""A model with something to save, and what it computes."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

import esft
from esft.checkpoint.adapter_tensors import adapter_tensors
from esft.experts.model_state import swapped_state
from esft.selection import ExpertSelection
from tests.esft.models import FAMILIES, tiny_model, token_batch


def tuned(family: str = "deepseek_v2", **more: bool) -> PreTrainedModel:
    """A swapped model whose selected tensors have moved."""
    model = esft.swap(tiny_model(family), ExpertSelection({2: [5, 0], FAMILIES[family][1]: [1]}, **more))
    torch.manual_seed(7)
    with torch.no_grad():
        for tensor in adapter_tensors(model, swapped_state(model).selection).values():
            value = tensor.read()
            tensor.write(value + torch.randn_like(value) * 0.05)
    return model


def logits(model: PreTrainedModel) -> Tensor:
    return model(**token_batch()).logits

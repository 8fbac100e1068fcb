"""A model with something to save, and what it computes."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

import esft
from esft.checkpoint.adapter_tensors import adapter_tensors
from esft.checkpoint.load import load_model
from esft.experts.model_state import swapped_state
from esft.experts.moe_layers import moe_layers
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


def tune(base: Path, selection: ExpertSelection, dtype: str = "auto") -> PreTrainedModel:
    """The model of a folder, whose selected experts have moved."""
    model = esft.swap(load_model(str(base), dtype), selection)
    with torch.no_grad():
        for layer in moe_layers(model):
            layer.experts.trained_gate_up_proj.mul_(1.25)
            layer.experts.trained_down_proj.mul_(-0.5)
    return model


def logits(model: PreTrainedModel) -> Tensor:
    return model(**token_batch()).logits

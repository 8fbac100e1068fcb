"""LoRA on every linear layer and on stacked experts, through PEFT (arXiv 2106.09685)."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from esft.errors import InputError
from esft.experts.moe_layers import moe_layers
from esft.experts.stock_layout import read_layout


def require_peft() -> Any:
    """The package. Raises InputError where it is not installed."""
    try:
        return importlib.import_module("peft")
    except ModuleNotFoundError as error:
        raise InputError("method lora needs the peft package: pip install 'esft[lora]'") from error


def add_lora(model: PreTrainedModel, rank: int, alpha: int) -> nn.Module:
    """PEFT's model around this one: every linear layer but the head and all stacked experts have additions that train.

    Args:
        rank: of the additions.
        alpha: their scaling times the rank.

    Raises InputError where PEFT is not installed, and for a rank above that of every matrix.
    """
    peft = require_peft()
    head = model.get_output_embeddings()
    linear = {n: m.weight for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
    stacked = {name: model.get_parameter(name) for name in _stacked_projections(model)}
    most = max(min(weight.shape[-2:]) for weight in (*linear.values(), *stacked.values()))
    if rank > most:
        raise InputError(f"lora_rank {rank}: no matrix of the model has a rank above {most}")
    lora = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=list(linear),
        target_parameters=list(stacked),
        task_type="CAUSAL_LM",
    )
    return peft.get_peft_model(model, lora)


def _stacked_projections(model: PreTrainedModel) -> Iterator[str]:
    """The names of the stacked experts' two projections, which are no linear layers to PEFT."""
    for layer in moe_layers(model):
        if not isinstance(layer.experts, nn.ModuleList):
            for name in read_layout(layer.experts, layer.name).names[:2]:
                yield f"{layer.name}.{name}"

"""A small swapped model, as it was or trained."""

from __future__ import annotations

from transformers import PreTrainedModel

import esft
from esft.selection import ExpertSelection
from tests.esft.experts import test_moe_layers as families
from tests.esft.models import tiny_model

SELECTION = ExpertSelection({1: [5, 2], 2: [0]})


def swapped(tuned: bool = False, family: str = "deepseek_v2") -> PreTrainedModel:
    model = esft.swap(tiny_model(family), SELECTION)
    if tuned:
        families.tune(model)
    return model

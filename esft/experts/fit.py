"""Whether a selection fits a model."""

from __future__ import annotations

from collections.abc import Sequence

from esft.errors import InputError
from esft.experts.moe_layers import MoELayer
from esft.selection import ExpertSelection


def check_fits(selection: ExpertSelection, layers: Sequence[MoELayer]) -> None:
    """Raise InputError unless every layer and expert of a selection exists, and shared experts where it names them."""
    selection.check({layer.index: layer.num_experts for layer in layers})
    check_shared(selection, layers)


def check_shared(selection: ExpertSelection, layers: Sequence[MoELayer]) -> None:
    """Raise InputError where a selection names shared experts of a model that has none."""
    if selection.shared_experts and not any(layer.shared_experts for layer in layers):
        raise InputError("selection names shared experts; the model has none")

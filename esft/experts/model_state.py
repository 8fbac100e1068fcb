"""What is remembered of a model: one object, kept on it as ``model.esft_state``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from esft.errors import InputError
from esft.selection import ExpertSelection

DEFAULT_ADAPTER = "default"  # the name of one that is loaded without a name, as in PEFT

Result = TypeVar("Result")


@dataclass(frozen=True)
class Base:
    """The weights that something is trained from.

    Attributes:
        name: the folder or hub id that they were loaded from.
        digest: see ``esft.checkpoint.digest``.
        dtype: in which they were when the digest was taken; None where a checkpoint does not say it.
        settings: what of the model's configuration its forward pass depends on.
    """

    name: str
    digest: str
    dtype: torch.dtype | None
    settings: dict[str, Any]


@dataclass
class Swapped:
    """What a swapped model needs to be saved, and to become the stock model again.

    Attributes:
        selection: what trains.
        base: the weights that the model had when it was swapped.
        required_grad: the stock model's ``requires_grad``, by parameter name.
        frozen: what the frozen experts are kept in.
        frozen_linear: what other frozen linear layers and embeddings are kept in.
        lossless: whether all of them are exactly what the base's are.
        stock: module path of a layer's experts -> the stock module, its weights taken out.
        load_hook: what lets ``load_state_dict`` read a checkpoint's names.
    """

    selection: ExpertSelection
    base: Base
    required_grad: dict[str, bool]
    frozen: str
    frozen_linear: str
    lossless: bool
    stock: dict[str, nn.Module] = field(default_factory=dict)
    load_hook: RemovableHandle | None = None


@dataclass
class Adapters:
    """The adapters that a model holds by name.

    Attributes:
        trained_from: the weights that all of them are of.
        held: name -> selection and tensors.
        active: the name of the one whose tensors the model has, None for the base.
        base: the base's tensors where the active adapter has written its own, in the CPU's memory.
    """

    trained_from: Base
    held: dict[str, tuple[ExpertSelection, dict[str, Tensor]]] = field(default_factory=dict)
    active: str | None = None
    base: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class ModelState:
    """Everything that is remembered of one model.

    Attributes:
        swapped: None for a stock model.
        adapters: None where none was loaded.
        settled: the adapters' tensors that have become a part of the base, whose own values are gone.
        found: what functions under ``once_per_model`` have found out, by their names.
    """

    swapped: Swapped | None = None
    adapters: Adapters | None = None
    settled: frozenset[str] = frozenset()
    found: dict[str, Any] = field(default_factory=dict)


def known_state(model: nn.Module) -> ModelState:
    """What is remembered of a model, to look at: nothing is put on one that has no state."""
    return vars(model).get("esft_state") or ModelState()  # not getattr: a wrapper would seem to have its model's


def model_state(model: nn.Module) -> ModelState:
    """What is remembered of a model, to add to: an empty state is put on one that has none."""
    return vars(model).setdefault("esft_state", ModelState())


def uncompiled(model: nn.Module) -> nn.Module:
    """The model that ``torch.compile`` has wrapped, or the model itself."""
    return model._modules.get("_orig_mod") or model


def swapped_state(model: nn.Module) -> Swapped:
    """Of a swapped model. Raises InputError for a stock one."""
    if (swapped := known_state(model).swapped) is None:
        raise InputError("the model is not swapped")
    return swapped


def check_lossless(model: nn.Module, what: str) -> None:
    """Raise InputError where a swapped model's frozen weights have lost precision, so that ``what`` cannot be done."""
    if not (swapped := swapped_state(model)).lossless:
        kept = {"experts": swapped.frozen, "linear layers": swapped.frozen_linear}
        packed = " and ".join(f"{part} are in {kind}" for part, kind in kept.items() if kind != "bf16")
        raise InputError(
            f"{what} needs the stock model's weights, and the frozen {packed}, which has cost "
            "some of their precision: save an adapter, and merge it into the checkpoint"
        )


def settle_adapter(model: nn.Module) -> None:
    """Make the adapter whose tensors the model has a part of the base; those held beside it were for another base."""
    state = known_state(model)
    if state.adapters is not None and state.adapters.active is not None:
        state.settled |= state.adapters.base.keys()
        state.adapters = None


def once_per_model(function: Callable[..., Result]) -> Callable[..., Result]:
    """Let a function of a model run once for each, and keep what it returns on the model.

    Its further arguments are what the caller knows of the model already.
    """

    @wraps(function)
    def kept(model: nn.Module, *known: Any) -> Result:
        found = model_state(model).found
        if function.__qualname__ not in found:
            found[function.__qualname__] = function(model, *known)
        return found[function.__qualname__]

    return kept

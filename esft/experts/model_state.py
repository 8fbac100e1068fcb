"""What is remembered of a model: one object, kept on it as ``model.esft_state``."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from esft.errors import InputError
from esft.selection import ExpertSelection

DEFAULT_ADAPTER = "default"  # the name of one that is loaded without a name, as in PEFT
BASE = "__base__"  # what PEFT calls none, in a batch that mixes adapters

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
class MixedAdapters:
    """The adapters that a model has side by side, so that the sequences of a batch may each have their own.

    Attributes:
        held: name -> selection. An adapter's number is its place here, from 1; 0 is the base.
        active: the name of the one that a batch without names has, None for the base.
        generating, running: the numbers of the sequences of the ``generate`` and of the forward pass that goes on,
            int64 [B]; None where the batch has no names.
    """

    held: dict[str, ExpertSelection]
    active: str | None = None
    generating: Tensor | None = None
    running: Tensor | None = None

    def numbers(self, names: Sequence[str], rows: int | None, device: torch.device) -> Tensor:
        """The numbers of the adapters of these names. Raises InputError for others, and for another count than rows."""
        if isinstance(names, str) or not isinstance(names, Sequence) or not all(isinstance(n, str) for n in names):
            raise InputError(f"adapter_names must be a list of names, one for each sequence, got {names!r}")
        known = [BASE, *self.held]
        if strange := [name for name in names if name not in known]:
            raise InputError(f"the model holds no adapter named {strange[0]!r}; it holds {sorted(self.held)}")
        if rows is not None and len(names) != rows:
            raise InputError(f"adapter_names has {len(names)} names, and the batch {rows} sequences")
        return torch.tensor([known.index(name) for name in names], device=device)

    def of_tokens(self, tokens: int) -> Tensor | None:
        """The number of every token's adapter, [T], in a batch of so many; None where it has no names.

        Beams and several answers to a prompt lie next to each other, as ``generate`` puts them.
        """
        numbers_B = self.generating if self.running is None else self.running
        if numbers_B is None:
            return None
        if tokens % max(len(numbers_B), 1):
            raise InputError(f"{tokens} tokens do not divide into {len(numbers_B)} sequences, as adapter_names has")
        return numbers_B[:, None].expand(-1, tokens // max(len(numbers_B), 1)).reshape(-1)


@dataclass
class ModelState:
    """Everything that is remembered of one model.

    Attributes:
        swapped: None for a stock model.
        adapters: None where none was loaded.
        mixed: None where none were loaded side by side.
        settled: the adapters' tensors that have become a part of the base, whose own values are gone.
        found: what functions under ``once_per_model`` have found out, by their names.
    """

    swapped: Swapped | None = None
    adapters: Adapters | None = None
    mixed: MixedAdapters | None = None
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


class OwnMethod:
    """A function in the place of one model's method, which gets the model as its first argument.

    In a deep copy it is the copy's, and it does not keep the model alive. Where nothing else holds the model, as in
    ``load(...).save_pretrained(out)``, it ends before this is called: what it consisted of is held here then. It and
    this would hold each other, so the model's end takes this out of it.
    """

    def __init__(self, model: nn.Module, name: str, function: Callable[..., Any]):
        self.__setstate__((model, name, function))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if (model := self._model()) is None:
            model = self._class.__new__(self._class)
            model.__dict__ = self._held
        return self._function(model, *args, **kwargs)

    def __getstate__(self) -> tuple[nn.Module | None, str, Callable[..., Any]]:
        return self._model(), self._name, self._function

    def __setstate__(self, state: tuple[nn.Module, str, Callable[..., Any]]) -> None:
        model, self._name, self._function = state
        name, self._class, self._held = self._name, type(model), (held := vars(model))
        self._model = weakref.ref(model, lambda _: held.pop(name, None))

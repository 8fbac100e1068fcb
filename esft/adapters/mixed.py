"""Several adapters side by side in one model, so that the sequences of one batch may each have their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from esft.adapters.folder import adapter_weights, check_base, check_model, open_adapter, selection_for
from esft.checkpoint.adapter_tensors import adapter_tensors
from esft.checkpoint.digest import base_below
from esft.errors import InputError
from esft.experts.model_state import BASE, MixedAdapters, OwnMethod, known_state, model_state, swapped_state
from esft.experts.moe_layers import is_dealt, moe_layers
from esft.experts.pooled_experts import Experts
from esft.selection import ExpertSelection
from esft.swapping.swap import swap, unswap

_KEPT_IN = ("frozen", "frozen_linear")  # a manifest's words for what the weights were in that did not train


def load_adapters(model: PreTrainedModel, adapters: Mapping[str, str | Path]) -> PreTrainedModel:
    """Load several adapters side by side, in place: then the sequences of one batch may each have their own.

    ``model(..., adapter_names=[...])`` and ``model.generate(..., adapter_names=[...])`` take a name for each sequence,
    ``"__base__"`` for none, as in PEFT. Without names all have the one that ``set_adapter`` has set, at first none.
    Gradients go to each adapter's own experts from its own sequences; ``save_adapter`` writes the one that is set.

    Args:
        model: the base of all of them, stock or swapped with an empty selection, in any format; a stock one is swapped.
        adapters: name -> folder.

    In every layer the trained pool holds the experts of all adapters, and the frozen pool the base's own, which stay
    as they are. Raises InputError, with nothing changed, for a name that cannot be used, for a model that holds
    adapters or trains experts already, for an adapter of another base, for some whose frozen weights were kept in other
    formats than the first one's, and for one that trains more than routed experts: of all else the model has one only.
    """
    check_model(model)
    state = known_state(model)
    if not adapters:
        raise InputError("no adapters are given")
    for name in adapters:
        if not isinstance(name, str) or not name or name == BASE:
            raise InputError(f"an adapter cannot be named {name!r}")
    if state.mixed is not None or state.adapters is not None:
        raise InputError("the model holds adapters already: load them all at once, into a model without any")
    if is_dealt(model):
        raise InputError("the experts are dealt out over processes, so no adapters can lie beside them")
    if state.swapped is not None and not state.swapped.selection.is_empty:
        raise InputError("the model's own experts train: load adapters into one swapped with an empty selection")
    paths = {name: Path(path) for name, path in adapters.items()}
    selections = _selections(model, paths)
    if stock := state.swapped is None:
        swap(model, ExpertSelection({}))
    try:
        _hold(model, MixedAdapters(selections), paths)
    except BaseException:
        _release(model)
        if stock:
            unswap(model)
        raise
    return model


def show_adapter(model: PreTrainedModel, mixed: MixedAdapters, name: str | None) -> None:
    """Let batches without names have this one of the adapters side by side. Raises InputError for an unknown name."""
    if name is not None and name not in mixed.held:
        raise InputError(f"the model holds no adapter named {name!r}; it holds {sorted(mixed.held)}")
    number = 0 if name is None else 1 + list(mixed.held).index(name)
    for experts in _experts(model).values():
        experts.show(number)
    mixed.active = name
    swapped_state(model).selection = ExpertSelection({}) if name is None else mixed.held[name]


def _selections(model: PreTrainedModel, paths: dict[str, Path]) -> dict[str, ExpertSelection]:
    """The adapters' selections. Raises InputError for what does not fit the model or one another."""
    base = cache(partial(base_below, model))
    listed = {layer.index for layer in moe_layers(model) if isinstance(layer.experts, nn.ModuleList)}
    kept_in: dict[str, tuple[Path, Any]] = {}
    found: dict[str, ExpertSelection] = {}
    for name, path in paths.items():
        if manifest := open_adapter(path):
            check_base(manifest, base, path)
        selection = selection_for(path, model)
        if selection.shared_experts or selection.non_expert_modules:
            more = "shared experts" if selection.shared_experts else "modules that are no experts"
            raise InputError(f"{path}: trains {more}, of which a model has one; side by side are routed experts only")
        if several := sorted(listed & selection.experts.keys()):
            raise InputError(
                f"{path}: layer {several[0]} has its experts in a ModuleList, which holds one adapter only"
            )
        for part in _KEPT_IN if manifest else ():
            first, kind = kept_in.setdefault(part, (path, manifest.get(part)))
            if kind != manifest.get(part):
                raise InputError(f"{path}: was made with {part} in {manifest.get(part)}, and {first} in {kind}")
        found[name] = replace(selection, chosen_by=manifest.get("chosen_by", {}))
    return found


def _hold(model: PreTrainedModel, mixed: MixedAdapters, paths: dict[str, Path]) -> None:
    for index, experts in _experts(model).items():
        experts.hold(mixed, [selection.experts.get(index, []) for selection in mixed.held.values()])
    for name, path in paths.items():
        show_adapter(model, mixed, name)
        tensors = adapter_tensors(model, mixed.held[name])
        with adapter_weights(path, tensors) as weights:
            for key, tensor in tensors.items():
                tensor.write(weights.get_tensor(key))
    show_adapter(model, mixed, None)
    model_state(model).mixed = mixed
    vars(model)["generate"] = OwnMethod(model, "generate", _generate)
    model.register_forward_pre_hook(_begin, with_kwargs=True)
    model.register_forward_hook(_end, always_call=True)


def _release(model: PreTrainedModel) -> None:
    """Back to a model that holds none."""
    for experts in _experts(model).values():
        if experts.mixed is not None:
            experts.show(0)
            experts.hold(None, [])
    swapped_state(model).selection = ExpertSelection({})


def _experts(model: PreTrainedModel) -> dict[int, Experts]:
    return {layer.index: layer.experts for layer in moe_layers(model) if isinstance(layer.experts, Experts)}


def _generate(model: PreTrainedModel, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
    """transformers' ``generate``, with an adapter for each prompt."""
    mixed = known_state(model).mixed
    assert mixed is not None
    if adapter_names is not None:
        mixed.generating = mixed.numbers(adapter_names, _rows(args, kwargs), model.device)
    try:
        return type(model).generate(model, *args, **kwargs)
    finally:
        mixed.generating = None


def _begin(model: PreTrainedModel, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Before a forward pass: note the adapters of its sequences."""
    names, mixed = kwargs.pop("adapter_names", None), known_state(model).mixed
    if names is not None and mixed is not None:
        if any(m.training and getattr(m, "gradient_checkpointing", False) for m in model.modules()):
            raise InputError("adapter_names and gradient checkpointing do not go together: turn one of them off")
        mixed.running = mixed.numbers(names, _rows(args, kwargs), model.device)
    return args, kwargs


def _end(model: PreTrainedModel, *_: Any) -> None:
    if (mixed := known_state(model).mixed) is not None:
        mixed.running = None


def _rows(args: tuple, kwargs: dict[str, Any]) -> int | None:
    """The sequences of a batch, where it is given in one of the usual ways."""
    given = [*args[:1], *(kwargs.get(name) for name in ("inputs", "input_ids", "inputs_embeds"))]
    return next((len(each) for each in given if isinstance(each, Tensor)), None)

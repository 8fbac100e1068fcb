"""An adapter's folder: its manifest, its selection and its tensors."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from esft.checkpoint.adapter_tensors import AdapterTensor, adapter_tensors
from esft.errors import InputError
from esft.experts.model_state import Base
from esft.experts.moe_layers import stock_weights
from esft.selection import ExpertSelection
from esft.storage.files import FLOATS, open_safetensors, write_json
from esft.storage.reading import read_json, shown

WEIGHTS = "adapter.safetensors"
SELECTION = "expert_cfg.json"
MANIFEST = "manifest.json"
PEFT_CONFIG = "adapter_config.json"  # of an adapter that PEFT wrote
FORMAT_VERSION = 2
_QUOTES = "'\""  # around a name that is shown
_SHOWN = 12  # characters of a digest
READABLE = (1, 2)  # version 1 has the first part of the digest alone, and no settings

FindBase = Callable[[torch.dtype | None], Base]  # what some weights are, after rounding to a dtype


def check_model(model: PreTrainedModel) -> None:
    """Raise InputError for a wrapper around a model, in which tensors have other names."""
    if not isinstance(model, PreTrainedModel):
        raise InputError(f"{type(model).__name__} is no transformers model; one that is wrapped has to be unwrapped")


def write_manifest(folder: Path, base: Base, chosen_by: dict[str, Any], kept_in: dict[str, str]) -> None:
    """What an adapter was trained from, how its experts were chosen, and what its frozen weights were kept in."""
    manifest = {
        "format_version": FORMAT_VERSION,
        "base_model": base.name,
        "base_digest": base.digest,
        "base_dtype": _name(base.dtype),
        "base_settings": base.settings,
        "chosen_by": chosen_by,
        **kept_in,
    }
    write_json(folder / MANIFEST, manifest)


def _name(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


def open_manifest(path: Path) -> dict[str, Any]:
    """The manifest alone, of an adapter of any kind. Raises InputError for one of another format."""
    manifest = read_json(path / MANIFEST)
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if type(version) is not int or version not in READABLE:
        readable = " or ".join(map(str, READABLE))
        raise InputError(f"{path / MANIFEST}: format_version must be {readable}, got {shown(version)}")
    kinds = {"base_model": str, "base_digest": str, "base_dtype": str, "base_settings": dict, "chosen_by": dict}
    for name, kind in kinds.items():
        if name in manifest and not isinstance(manifest[name], kind):
            raise InputError(f"{path / MANIFEST}: {name} is {shown(manifest[name])}")
    if "base_digest" not in manifest:
        raise InputError(f"{path / MANIFEST}: names no base (no base_digest)")
    return manifest


def difference(manifest: dict[str, Any], base: FindBase) -> str | None:
    """Why an adapter is not of this base; None where its manifest names it.

    A setting that only one of the two has is passed over, as versions of transformers differ in them.
    """
    trained = manifest.get("base_dtype")
    found = base(torch.float16 if trained == "float16" else None)
    if trained == "float16" and not _names(manifest, found):
        found = base(None)
    if not _names(manifest, found):
        hint = ""
        if found.dtype is not None and trained not in (None, _name(found.dtype)):
            hint = f"; it was trained in {trained} and these are in {_name(found.dtype)}: load its base in {trained}"
        theirs, ours = _differing(str(manifest.get("base_digest")), _comparable(manifest, found))
        return (
            f"made from another base ({shown(manifest.get('base_model')).strip(_QUOTES)}, digest {theirs}), "
            f"not from these weights ({ours}){hint}"
        )
    for name, theirs in manifest.get("base_settings", {}).items():
        if found.settings.get(name, theirs) != theirs:
            return f"made from a base with {name} {shown(theirs)}; this model has {shown(found.settings[name])}"
    return None


def _differing(one: str, other: str) -> tuple[str, str]:
    """Of two digests that differ the beginnings of the parts that do: the first one or the next."""
    pairs = zip_longest(one.split("-"), other.split("-"), fillvalue="none")
    mine, theirs = next(((a, b) for a, b in pairs if a[:_SHOWN] != b[:_SHOWN]), (one, other))
    return mine[:_SHOWN], theirs[:_SHOWN]


def _names(manifest: dict[str, Any], base: Base) -> bool:
    return manifest.get("base_digest") == _comparable(manifest, base)


def _comparable(manifest: dict[str, Any], base: Base) -> str:
    """What of a base's digest a manifest of this version has."""
    return base.digest.partition("-")[0] if manifest.get("format_version") == 1 else base.digest


def check_base(manifest: dict[str, Any], base: FindBase, adapter: str | Path) -> None:
    """Raise InputError unless an adapter's manifest names this base."""
    if (why := difference(manifest, base)) is not None:
        raise InputError(f"{adapter}: {why}")


def open_adapter(path: Path) -> dict[str, Any]:
    """The manifest of an adapter folder.

    Published adapters have none: then it is empty, and a warning says that the base is not checked. Raises InputError
    for a folder that is no adapter.
    """
    if (path / PEFT_CONFIG).is_file():
        raise InputError(
            f"{path}: a PEFT adapter, which PEFT itself merges: PeftModel.from_pretrained(AutoModelForCausalLM."
            f"from_pretrained(BASE), {str(path)!r}).merge_and_unload().save_pretrained(OUT)"
        )
    if not (path / SELECTION).is_file():
        raise InputError(f"{path}: not an adapter folder (no {SELECTION})")
    if not os.path.lexists(path / MANIFEST):
        unknown = f"{path}: does not say which base it is of (no {MANIFEST})"
        warnings.warn(f"{unknown}; only names and shapes are checked", stacklevel=3)
        return {}
    return open_manifest(path)


def selection_for(path: Path, model: PreTrainedModel) -> ExpertSelection:
    """An adapter's selection. Raises InputError where it does not fit the model."""
    selection, weights = ExpertSelection.load(path / SELECTION), stock_weights(model)
    try:
        selection.check(weights.num_experts, bool(weights.shared))
    except InputError as error:
        raise InputError(f"{path / SELECTION}: {error}") from error
    return selection


def selected_tensors(path: Path, model: PreTrainedModel) -> tuple[ExpertSelection, dict[str, AdapterTensor]]:
    """An adapter's selection, and what of the model it trains. Raises InputError where it does not fit the model."""
    selection = ExpertSelection.load(path / SELECTION)
    try:
        return selection, adapter_tensors(model, selection)
    except InputError as error:
        raise InputError(f"{path / SELECTION}: {error}") from error


class AdapterWeights:
    """An adapter's tensors in its safetensors files, by the names that the model has for them."""

    def __init__(self, handles: dict[str, tuple[Any, str]]):
        self._handles = handles  # name -> its open file and the name there

    def get_tensor(self, name: str) -> Tensor:
        """A tensor. Raises InputError for one with values that are no numbers."""
        handle, own = self._handles[name]
        tensor = handle.get_tensor(own)
        check_finite(tensor, f"adapter's tensor {own}")
        return tensor


def check_finite(tensor: Tensor, where: str) -> None:
    """Raise InputError for a tensor of floating point that holds infinities or what is no number."""
    if tensor.is_floating_point() and not bool(tensor.float().isfinite().all()):
        raise InputError(f"{where} holds values that are infinite or no numbers")


@contextmanager
def adapter_weights(path: Path, tensors: dict[str, AdapterTensor]) -> Iterator[AdapterWeights]:
    """An adapter's open weights: ours, or the safetensors files of a published adapter.

    Published adapters may leave out a leading ``model.`` of the names. Raises InputError unless the tensors are exactly
    these, once each, in their shapes and of floating point.
    """
    files = [path / WEIGHTS] if (path / WEIGHTS).is_file() else sorted(path.glob("*.safetensors"))
    if not files:
        raise InputError(f"{path}: holds no safetensors file (pickled weights are never loaded)")
    with ExitStack() as stack:
        found: dict[str, tuple[Any, str]] = {}
        for file in files:
            handle = stack.enter_context(open_safetensors(file))
            for own in handle.keys():  # noqa: SIM118 (a safetensors handle is no mapping)
                name = f"model.{own}" if own not in tensors and f"model.{own}" in tensors else own
                if name in found:
                    raise InputError(f"{path}: holds tensor {name} twice")
                found[name] = handle, own
        if missing := sorted(tensors.keys() - found.keys()):
            raise InputError(f"{path}: tensor {missing[0]} is missing ({len(missing)} missing in all)")
        if extra := sorted(found.keys() - tensors.keys()):
            raise InputError(f"{path}: tensor {extra[0]} belongs to nothing selected ({len(extra)} such in all)")
        for name, tensor in tensors.items():
            handle, own = found[name]
            stored = handle.get_slice(own)
            if stored.get_dtype() not in FLOATS:
                raise InputError(
                    f"{path}: tensor {own} is {stored.get_dtype()}, not floating point as {', '.join(FLOATS)} are"
                )
            shape, wanted = tuple(stored.get_shape()), tensor.shape
            if shape != wanted:
                raise InputError(f"{path}: tensor {own} has shape {shape}, the base has {wanted}")
        yield AdapterWeights(found)

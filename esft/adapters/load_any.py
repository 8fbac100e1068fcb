"""Loading an adapter of either kind: ESFT's, or one of PEFT's, which is checked before PEFT reads it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from esft.adapters.folder import (
    MANIFEST,
    PEFT_CONFIG,
    SELECTION,
    check_base,
    check_finite,
    open_manifest,
    selection_for,
)
from esft.adapters.load import load_adapter
from esft.bounds import within
from esft.checkpoint.digest import model_base
from esft.checkpoint.load import load_model, load_skeleton
from esft.errors import InputError, first_line, reading
from esft.experts.pooled_experts import BF16
from esft.selection import ExpertSelection
from esft.storage.files import FLOATS, open_safetensors
from esft.storage.reading import check_name, read_json, shown
from esft.swapping.load import AUTO, load

PEFT_WEIGHTS = "adapter_model.safetensors"
MOST = 1 << 20  # of a number in a configuration: ranks and scales
_RANKS = ("r", "init_r", "target_r")
# What PEFT makes regular expressions of, and what it puts around. Those of the first two are compared with whole names,
# and lists of them are names.
_NAMES = ("target_modules", "exclude_modules")
_PATTERNS = {
    **dict.fromkeys(_NAMES, "{}"),
    **dict.fromkeys(("rank_pattern", "alpha_pattern"), r"(.*\.)?({})$"),
    "layers_pattern": r"(?:^|.*?\.){}\.(?P<idx>\d+)\.",
    "modules_to_save": r"(^|.*\.){}($|\..*)",
}
# A name, its points escaped or not: nothing in it is tried in several ways.
_PLAIN = re.compile(r"[\w.-]*(\\\.[\w.-]*)*")
_PISSA = re.compile(r"pissa_niter_\d{1,3}")  # a decomposition of every weight, in so many iterations
MATCHING = 10  # seconds for the patterns of one setting


def adapter_folder(path: str | Path) -> Path:
    """The adapter's folder that is meant: of a run's the adapter in it. Raises InputError where there is none."""
    check_name(path)
    path = Path(path)
    for folder in (path, path / "adapter"):
        if any((folder / mark).is_file() for mark in (SELECTION, PEFT_CONFIG)):
            return folder
    raise InputError(f"{path}: not an adapter folder (no {SELECTION})")


def load_any_adapter(model: PreTrainedModel, adapter: str | Path) -> Any:
    """The stock model with an ESFT adapter or a PEFT adapter folder loaded; of a run's folder, with its adapter.

    A PEFT adapter that ``esft train`` wrote is held to its base like an ESFT one. Raises InputError for anything else,
    for a PEFT adapter without safetensors, with tensors that are missing, of something else or not finite.
    """
    folder = adapter_folder(adapter)
    if not (folder / PEFT_CONFIG).is_file():
        return load_adapter(model, folder)
    if os.path.lexists(folder / MANIFEST):
        check_base(open_manifest(folder), partial(model_base, model), folder)
    try:
        from peft import PeftModel, get_peft_model_state_dict
    except ModuleNotFoundError as error:
        raise InputError(f"{folder}: a PEFT adapter needs the peft package: pip install 'esft[lora]'") from error
    config = _checked_config(folder)
    if not (folder / PEFT_WEIGHTS).exists():
        raise InputError(f"{folder}: holds no {PEFT_WEIGHTS} (pickled weights are never loaded)")
    with open_safetensors(folder / PEFT_WEIGHTS) as handle:
        names = set(handle.keys())
        longest = max((side for name in names for side in handle.get_slice(name).get_shape()), default=0)
        for rank in _ranks(config):
            if rank > longest:
                raise InputError(f"{folder / PEFT_CONFIG}: has a rank of {rank}, and no tensor has so many rows")
        for name in names:
            kind = handle.get_slice(name).get_dtype()
            if kind not in FLOATS:
                raise InputError(f"{folder / PEFT_WEIGHTS}: tensor {name} is {kind}, not floating point")
            check_finite(handle.get_tensor(name), f"{folder / PEFT_WEIGHTS}: tensor {name}")
    _check_patterns(config, model, folder)
    try:
        loaded = PeftModel.from_pretrained(model, str(folder)).eval()
        needed = get_peft_model_state_dict(loaded, save_embedding_layers=False).keys()
        known = needed | get_peft_model_state_dict(loaded, save_embedding_layers=True).keys()
    except Exception as error:  # whatever PEFT says of a configuration that does not fit
        raise InputError(f"{folder}: cannot load this PEFT adapter ({first_line(error)})") from error
    for kind, strange in (("is of nothing that it adapts", names - known), ("is missing", needed - names)):
        if strange:
            raise InputError(f"{folder / PEFT_WEIGHTS}: tensor {min(strange)} {kind} ({len(strange)} such in all)")
    return loaded


def load_with_adapter(
    path: str,
    adapter: str | Path | None,
    frozen: str = AUTO,
    dtype: str = "auto",
    backend: str = "auto",
    trust_remote_code: bool = False,
    progress: bool = False,
    frozen_linear: str = BF16,
) -> Any:
    """A checkpoint's model with an adapter of either kind, on our experts where nothing but ESFT has touched them.

    Args:
        adapter: folder of an adapter, or of a run that holds one; None for the model alone.
        The others are those of ``esft.load``.

    Raises what ``esft.load`` and ``load_any_adapter`` raise.
    """
    options = frozen, dtype, backend, "none", trust_remote_code, progress, frozen_linear
    if adapter is None:
        return load(path, ExpertSelection({}), *options)
    folder = adapter_folder(adapter)
    with reading(folder):
        if not (folder / PEFT_CONFIG).is_file():
            chosen = selection_for(folder, load_skeleton(path, trust_remote_code))
            # The adapter's experts are in the trained pool: what is in few bits cannot be written.
            return load_adapter(load(path, ExpertSelection(chosen.experts), *options), folder)
        if few_bits := {frozen, frozen_linear} - {AUTO, BF16}:
            raise InputError(f"{folder}: a PEFT adapter changes all experts, so none can be frozen in {min(few_bits)}")
        return load_any_adapter(load_model(path, dtype, trust_remote_code), folder)


def _ranks(config: dict[str, Any]) -> Iterator[float]:
    """All ranks that a PEFT configuration says; matrices of such are made before they are compared with the tensors."""
    pattern = config.get("rank_pattern")
    said = [config.get(name) for name in _RANKS] + (list(pattern.values()) if isinstance(pattern, dict) else [])
    yield from (rank for rank in said if isinstance(rank, int | float))


def _check_patterns(config: dict[str, Any], model: PreTrainedModel, folder: Path) -> None:
    """Raise InputError for patterns of modules that are none, or not compared with their names within seconds.

    PEFT takes these texts for regular expressions, some of which take longer than the age of the universe.
    """
    names = [name for name, _ in model.named_modules()]
    for key, around in _PATTERNS.items():
        said = config.get(key)
        listed = list(said) if isinstance(said, dict) or (isinstance(said, list) and key not in _NAMES) else [said]
        where = f"{folder / PEFT_CONFIG}: {key}"
        try:
            with within(MATCHING):
                for pattern in (each for each in listed if isinstance(each, str) and not _PLAIN.fullmatch(each)):
                    compiled = re.compile(around.format(pattern))
                    for name in names:
                        (compiled.fullmatch if key in _NAMES else compiled.match)(name)
        except (re.error, RecursionError, OverflowError) as error:
            raise InputError(f"{where} has a pattern that is none ({first_line(error)})") from error
        except InputError as error:
            raise InputError(f"{where} {shown(said)}: {error}") from error


def _checked_config(folder: Path) -> dict[str, Any]:
    """A PEFT configuration. Raises InputError for no known kind, and for one that reads more than its own weights."""
    from peft import PromptLearningConfig
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    config = read_json(folder / PEFT_CONFIG)
    kind = config.get("peft_type") if isinstance(config, dict) else None
    known = {str(each.value): settings for each, settings in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if not isinstance(kind, str) or kind not in known:
        raise InputError(f"{folder / PEFT_CONFIG}: peft_type is {shown(kind)}; PEFT has {', '.join(sorted(known))}")
    for each in fields(known[kind]):
        value = config.get(each.name)
        where = f"{folder / PEFT_CONFIG}: {each.name} is {shown(value)}"
        if value is not None and each.type in ("bool", bool) and not isinstance(value, bool):
            raise InputError(f"{where}, not true or false")
        number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= MOST
        if value is not None and each.type in ("int", int, "float", float) and not number:
            raise InputError(f"{where}, not a number of at most {MOST:,}")
    begun = config.get("init_lora_weights")
    if isinstance(begun, str) and begun.startswith("pissa_niter_") and not _PISSA.fullmatch(begun):
        raise InputError(f"{folder / PEFT_CONFIG}: init_lora_weights is {shown(begun)}; of iterations 999 are the most")
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        raise InputError(f"{folder / PEFT_CONFIG}: task_type is {shown(config['task_type'])}; only CAUSAL_LM is read")
    if issubclass(known[kind], PromptLearningConfig) or config.get("megatron_config"):
        raise InputError(f"{folder / PEFT_CONFIG}: a {kind} adapter of this kind is not supported; LoRA is")
    return config

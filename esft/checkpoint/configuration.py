"""What a model's configuration may say, before another library acts on it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from esft.errors import InputError
from esft.storage.limits import EXPERTS, EXPERTS_IN_ALL, LAYERS, SIZE
from esft.storage.reading import shown

_MOST = {"layers": LAYERS, "experts": EXPERTS, "size": SIZE}
# What no model can have none of.
_SOME = {
    "hidden_size", "vocab_size", "num_hidden_layers", "num_attention_heads", "num_experts_per_tok",
    "max_position_embeddings",
}  # fmt: skip
_ROUTED = ("num_experts", "n_routed_experts", "num_local_experts")
_TOPK = ("greedy", "group_limited_greedy")
_ROPE = ("rope_parameters", "rope_scaling")  # the latter by earlier versions of transformers
_ROPE_POSITIVE = ("rope_theta", "factor", "original_max_position_embeddings", "partial_rotary_factor")
_ROPE_NUMBERS = (
    "attention_factor", "beta_fast", "beta_slow", "low_freq_factor", "high_freq_factor", "mscale", "mscale_all_dim",
)  # fmt: skip
_ROPE_MOST = 1e12
_IMPLEMENTATION = re.compile("_?(attn|experts)_implementation(_internal)?")
_IMPLEMENTATIONS = {
    "attn": ("eager", "sdpa", "flash_attention_2", "flash_attention_3"),
    "experts": ("eager", "batched_mm", "grouped_mm"),
}


def check_numbers(raw: Any, where: str) -> None:
    """Raise InputError for what no model has, of any kind.

    That is a configuration that is no mapping, numbers beyond ``storage/limits.py``, and implementations that would be
    code from the hub, or cannot compute all that is done here.
    """
    if not isinstance(raw, dict):
        raise InputError(f"{where}: not a model's configuration, which is a mapping")
    if (named := raw.get("architectures")) is not None and not _is_names(named):
        raise InputError(f"{where}: architectures is {shown(named)}, not a list of names")
    routed = [raw[name] for name in _ROUTED if type(raw.get(name)) is int]
    if type(chosen := raw.get("num_experts_per_tok")) is int and routed and chosen > max(routed):
        raise InputError(f"{where}: num_experts_per_tok is {chosen}, of {max(routed)} experts")
    for part in (raw, *raw.values()):
        for name, value in part.items() if isinstance(part, dict) else ():
            if (match := _IMPLEMENTATION.fullmatch(str(name))) and value not in (None, *_IMPLEMENTATIONS[match[1]]):
                raise InputError(f"{where}: {name} is {shown(value)}, which is not supported; take it out")
    for part in (raw, raw.get("text_config")):
        if isinstance(part, dict):
            _check_rope(part, where)
    largest = {"layers": 1, "experts": 1}
    for name, value in _numbers(raw):
        kind = _kind(name)
        if kind is not None and value > _MOST[kind]:
            raise InputError(f"{where}: {name} is {shown(value)}; at most {_MOST[kind]:,} are supported")
        if name in _SOME and value < 1:
            raise InputError(f"{where}: {name} is {shown(value)}, which no model has")
        if name.endswith(("dropout", "_pdrop")) and not 0 <= value <= 1:
            raise InputError(f"{where}: {name} is {shown(value)}, no share of values to drop")
        if kind in largest:
            largest[kind] = max(largest[kind], int(value))
    if (total := largest["layers"] * largest["experts"]) > EXPERTS_IN_ALL:
        raise InputError(f"{where}: says {total:,} experts in all; at most {EXPERTS_IN_ALL:,} are supported")


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _kind(name: str) -> str | None:
    """Which limit a number of this name has."""
    if name.endswith(("_size", "_dim", "_heads", "_rank", "n_embd", "n_head", "d_model", "d_ff")):
        return "size"
    return next((kind for kind in ("layers", "experts") if kind in name or name.endswith(f"_{kind[:-1]}")), None)


def _numbers(raw: dict[str, Any]) -> Iterator[tuple[str, int | float]]:
    """All numbers of a configuration by name, those of its parts too."""
    for name, value in raw.items():
        if isinstance(value, dict):
            yield from _numbers(value)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield name, value


def _check_rope(raw: dict[str, Any], where: str) -> None:
    """Raise InputError naming what of the rotary embedding's parameters is no such thing."""
    for name in _ROPE:
        if (found := raw.get(name)) is None:
            continue
        if not isinstance(found, dict):
            raise InputError(f"{where}: {name} is {shown(found)}, not a mapping")
        nested = {f"{name}: {kind}": part for kind, part in found.items() if isinstance(part, dict)}
        for at, part in (nested or {name: found}).items():
            for kind in ("rope_type", "type"):
                if kind in part and not isinstance(part[kind], str):
                    raise InputError(f"{where}: {at}: {kind} is {shown(part[kind])}, not a name")
            for key in _ROPE_POSITIVE:
                if key in part and not (_is_number(part[key]) and 0 < part[key] <= _ROPE_MOST):
                    raise InputError(f"{where}: {at}: {key} is {shown(part[key])}, not a number above 0")
            for key in _ROPE_NUMBERS:
                if not (part.get(key) is None or _is_number(part[key])):
                    raise InputError(f"{where}: {at}: {key} is {shown(part[key])}, not a number")
    theta = raw.get("rope_theta")
    if theta is not None and not (_is_number(theta) and 0 < theta <= _ROPE_MOST):
        raise InputError(f"{where}: rope_theta is {shown(theta)}, not a number above 0")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_model(config: PreTrainedConfig, where: str) -> None:
    """Raise InputError for what transformers takes into a configuration, and no model of its kind can compute with."""
    if not type(config).__module__.startswith("transformers."):
        return  # code of the checkpoint's own, which knows what it means
    for name in config.architectures or ():
        named = getattr(transformers, name, None)  # none of transformers' own: a later version's, or code of its own
        own = getattr(named, "config_class", None)
        if isinstance(named, type) and issubclass(named, PreTrainedModel) and not (own and isinstance(config, own)):
            raise InputError(f"{where}: architectures names {name}, which is no model of type {config.model_type}")
    text = config.get_text_config()
    routed = next((count for name in _ROUTED if type(count := getattr(text, name, None)) is int), 0)
    chosen = getattr(text, "num_experts_per_tok", 1)
    if routed > 1 and type(chosen) is not int:
        raise InputError(f"{where}: num_experts_per_tok is {shown(chosen)}, not a number of the {routed} experts")
    if config.return_dict is not True:
        raise InputError(f"{where}: return_dict is {shown(config.return_dict)}; only true is supported")
    method = getattr(text, "topk_method", None)
    if hasattr(type(text), "topk_method") and method not in _TOPK:
        raise InputError(f"{where}: topk_method is {shown(method)}, none of {', '.join(_TOPK)}")
    if hasattr(text, "n_group") and routed > 1:
        _check_groups(text, routed, chosen, where)
    rope = getattr(text, "rope_parameters", None)
    for part in [rope, *rope.values()] if isinstance(rope, dict) else ():
        kind = part.get("rope_type", "default") if isinstance(part, dict) else "default"
        if not hasattr(text, f"_validate_{kind}_rope_parameters"):
            raise InputError(f"{where}: rope_type is {shown(kind)}, which transformers does not have")


def _check_groups(text: PreTrainedConfig, routed: int, chosen: int, where: str) -> None:
    """Raise InputError where a router that first chooses groups of experts cannot have these."""
    method, groups, taken = getattr(text, "topk_method", None), text.n_group, getattr(text, "topk_group", None)
    optional = getattr(type(text), "n_group", None) is None and method != "group_limited_greedy"
    if method == "greedy" or (optional and groups is None and taken is None):
        return  # has no groups
    if type(groups) is not int or groups < 1 or routed % groups:
        raise InputError(f"{where}: n_group is {shown(groups)}, which does not divide the {routed} experts")
    if type(taken) is not int or not 1 <= taken <= groups:
        raise InputError(f"{where}: topk_group is {shown(taken)}, of {groups} groups of experts")
    if chosen > (held := taken * routed // groups):
        raise InputError(
            f"{where}: num_experts_per_tok is {chosen}, and topk_group leaves {held} experts to choose from"
        )

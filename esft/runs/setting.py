"""One setting of a training: what it may be, and its value of what a file or a command line has for it."""

from __future__ import annotations

import re
from dataclasses import Field, field
from typing import Any

from esft.errors import InputError
from esft.storage.reading import shown

_TRUTH = {how(word): word == "true" for word in ("true", "false") for how in (str, str.title, str.upper)}  # as YAML
_NUMBER = re.compile(r"[+-]?(\d{1,400}(\.\d*)?([eE][+-]?\d{1,4})?|\.\d+([eE][+-]?\d{1,4})?|\.?inf)", re.ASCII)


def setting(default: Any, text: str, within: str = "", choices: tuple[str, ...] = ()) -> Any:
    """A field of ``TrainConfig``.

    Args:
        default: its value where nothing is said.
        text: help, with the unit.
        within: the interval of the numbers that are allowed, as in mathematics: "[1, inf)" has 1 and excludes infinity.
        choices: the texts that are allowed.
    """
    return field(default=default, metadata={"text": text, "within": within, "choices": choices})


def check_setting(each: Field, value: Any, where: str, text: str | None = None) -> None:
    """Raise InputError where a value is not one of its setting's choices, or outside its interval.

    Args:
        text: what a number was made of, where that was a text.
    """
    said = shown(value) if text is None else shown(text)[1:-1]
    kind = str(each.type)
    if "bool" in kind and not isinstance(value, bool) and not (value is None and "None" in kind):
        raise InputError(f"{where} must be {kind}, got {said}")
    choices, within = each.metadata["choices"], each.metadata["within"]
    if choices and value not in choices:
        raise InputError(f"{where} must be one of {', '.join(choices)}, got {shown(value)}")
    if within and value is not None:
        low, high = (2.0**63 if end == "2**63" else float(end) for end in within[1:-1].split(", "))
        above = value > low if within[0] == "(" else value >= low
        below = value < high if within[-1] == ")" else value <= high
        if not (above and below):
            raise InputError(f"{where} must be in {within}, got {said}")
    if isinstance(value, int) and value >= 2**63:
        raise InputError(f"{where} must be below 2**63, got {said}")


def converted(each: Field, value: Any, where: str) -> Any:
    """The setting's value, of what a file or a command line has for it.

    Args:
        where: what to call the setting in an error.

    Raises InputError for what is of another kind, or as ``check_setting`` does.
    """
    kind = str(each.type)
    try:
        if value is None and "None" in kind:
            return None
        if "bool" in kind:
            return value if isinstance(value, bool) else _TRUTH[value]
        if isinstance(value, bool) or (isinstance(value, str) and "str" not in kind and not _NUMBER.fullmatch(value)):
            raise ValueError
        if "float" in kind:
            found = float(value.replace(".inf", "inf") if isinstance(value, str) else value)
            if found == 0 and isinstance(value, str) and re.search("[1-9]", re.split("[eE]", value)[0]):
                raise ValueError  # below the smallest number
        elif "int" in kind:
            if isinstance(value, float) and not value.is_integer():
                raise ValueError
            found = int(value.removesuffix(".0") if isinstance(value, str) else value)
        elif isinstance(value, str):
            found = value
        else:
            raise ValueError
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{where} must be {kind}, got {shown(value)}") from error
    check_setting(each, found, where, value if isinstance(value, str) else None)
    return found

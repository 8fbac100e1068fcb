"""What a tokenizer's files may hold, before another library reads them: its errors name none of them."""

from __future__ import annotations

import base64
import os
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from esft.errors import InputError, check_is_error, first_line
from esft.storage.reading import read_json, read_text, shown
from esft.transformers_internals import CHAT_TEMPLATE_DIR

# What of a tokenizer is one JSON mapping.
_MAPPINGS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json")
_PROGRAMS = ("normalizer", "pre_tokenizer", "decoder")  # of the first of them: what is done with a text


def check_tokenizer_files(folder: Path) -> None:
    """Raise InputError naming the first of a tokenizer's files that is not readable at all."""
    for name in _MAPPINGS:
        if not os.path.lexists(folder / name):
            continue
        if not isinstance(values := read_json(folder / name), dict):
            raise InputError(f"{folder / name}: not a mapping, as a tokenizer has it")
        for part in _PROGRAMS:
            if (flaw := _breaks_off(values.get(part))) is not None:
                raise InputError(f"{folder / name}: has {flaw}, on which the tokenizer's code breaks off")
        model = values.get("model")
        if isinstance(model, dict) and model.get("dropout"):
            raise InputError(f"{folder / name}: splits texts at random (dropout is {shown(model['dropout'])})")
    templates = [folder / "chat_template.jinja", *sorted((folder / CHAT_TEMPLATE_DIR).glob("*.jinja"))]
    for template in filter(os.path.lexists, templates):
        if read_text(template).startswith("\ufeff"):
            raise InputError(f"{template}: begins with a byte order mark, which would be in every prompt; take it out")


def _breaks_off(program: Any) -> str | None:
    """What in a part of a ``tokenizer.json``, or in what it is made of, compiled code does not survive."""
    if not isinstance(program, dict | list):
        return None
    if isinstance(program, dict):
        if program.get("pattern") in ({"String": ""}, {"Regex": ""}):
            return "an empty pattern"
        if program.get("type") == "Precompiled" and not _is_charsmap(program.get("precompiled_charsmap")):
            return "a precompiled_charsmap that is none"
    inner = map(_breaks_off, program.values() if isinstance(program, dict) else program)
    return next((flaw for flaw in inner if flaw is not None), None)


def _is_charsmap(text: Any) -> bool:
    """Whether a text is SentencePiece's map of characters: in base64 the size of a table in bytes, the table, texts."""
    try:
        data = base64.b64decode(text, validate=True)
        size = int.from_bytes(data[:4], "little") // 4 * 4
        data[4 + size :].decode()
    except (TypeError, ValueError):
        return False
    return len(data) >= 4 + size


def flaw_of(path: Path) -> str | None:
    """What is wrong with a ``tokenizer.json``; None for one that is not there, or that is sound."""
    try:
        if path.is_file():
            Tokenizer.from_file(str(path))
    except BaseException as error:  # it raises no other class, or panics
        check_is_error(error)
        return first_line(error)
    return None

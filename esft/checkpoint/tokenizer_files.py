"""What a tokenizer's files may hold, before another library reads them: its errors name none of them."""

from __future__ import annotations

import os
from pathlib import Path

from tokenizers import Tokenizer

from esft.errors import InputError, first_line
from esft.storage.reading import read_json, read_text
from esft.transformers_internals import CHAT_TEMPLATE_DIR

# What of a tokenizer is one JSON mapping.
_MAPPINGS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json")


def check_tokenizer_files(folder: Path) -> None:
    """Raise InputError naming the first of a tokenizer's files that is not readable at all."""
    for name in _MAPPINGS:
        if os.path.lexists(folder / name) and not isinstance(read_json(folder / name), dict):
            raise InputError(f"{folder / name}: not a mapping, as a tokenizer has it")
    templates = [folder / "chat_template.jinja", *sorted((folder / CHAT_TEMPLATE_DIR).glob("*.jinja"))]
    for template in filter(os.path.lexists, templates):
        if read_text(template).startswith("\ufeff"):
            raise InputError(f"{template}: begins with a byte order mark, which would be in every prompt; take it out")


def flaw_of(path: Path) -> str | None:
    """What is wrong with a ``tokenizer.json``; None for one that is not there, or that is sound."""
    try:
        if path.is_file():
            Tokenizer.from_file(str(path))
    except Exception as error:  # it raises no other class
        return first_line(error)
    return None

"""Changing the files of a checkpoint that a test has written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

WEIGHTS = "model.safetensors"


def rewrite(base: Path, change: Callable[[dict], Any]) -> None:
    """Change the tensors of a checkpoint's one file."""
    tensors = load_file(base / WEIGHTS)
    change(tensors)
    save_file(tensors, base / WEIGHTS, {"format": "pt"})


def rewrite_json(path: Path, change: Callable[[Any], Any]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))

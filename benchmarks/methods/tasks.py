"""The tasks of the comparison: their files, made where they are not there."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import redirect_stdout
from importlib import import_module
from io import StringIO
from pathlib import Path

from esft.cli.parser import main
from examples.demo import MODEL

# By the module of examples/ that makes each. Adaptations are what the base cannot do; it half knows the enhancement.
TASKS = {
    "home_assistant": "home_assistant",  # adaptation: commands to calls of functions
    "phonemes": "cmudict_phonemes",  # adaptation: spelling to sounds
    "dates": "dates",  # adaptation: spellings of a day to one
    "units": "units",  # adaptation: amounts in another unit
    "settings": "settings_json",  # enhancement: flat JSON is known, nested is not
}
SIZES = {"train": 12_000, "validation": 300, "test": 500}


def files(task: str, folder: Path, sizes: dict[str, int]) -> Path:
    """The folder with a task's train, validation and test.jsonl."""
    out = folder / task
    if not (out / "test.jsonl").exists():
        options = [word for split, size in sizes.items() for word in (f"--{split}", str(size))]
        _quietly(import_module(f"examples.{TASKS[task]}").main, "--out", str(out), *options)
    return out


def scores(task: Path) -> Path:
    """The file of what a task's experts score by every rule, beside its records."""
    out = task / "scores.json"
    if not out.exists():
        common = ["--model", str(MODEL), "--data", str(task / "train.jsonl"), "--out", str(out), "--quiet"]
        how = ["--max-length", "512", "--batch-size", "8", "--outputs", "--gradients"]
        if _quietly(main, "score", *common, *how):
            raise RuntimeError(f"{task}: no scores, see above")
    return out


def general(folder: Path) -> Path:
    """The file of general data: what a model should still know afterwards."""
    out = folder / "general.jsonl"
    if not out.exists():
        _quietly(import_module("examples.general").main, "--out", str(out))
    return out


def _quietly(command: Callable[[list[str]], int | None], *arguments: str) -> int | None:
    """The status of a command whose output nobody reads."""
    with redirect_stdout(StringIO()):
        return command(list(arguments))

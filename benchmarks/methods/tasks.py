"""The tasks of the comparison: their files, made where they are not there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

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
        command = [sys.executable, "-m", f"examples.{TASKS[task]}", "--out", str(out), *options]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ)
    return out


def general(folder: Path) -> Path:
    """The file of general data: what a model should still know afterwards."""
    out = folder / "general.jsonl"
    if not out.exists():
        subprocess.run(
            [sys.executable, "-m", "examples.general", "--out", str(out)], check=True, stdout=subprocess.DEVNULL
        )
    return out

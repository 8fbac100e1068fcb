"""What shows a run's figures beside its own file: TensorBoard, or Weights & Biases."""

from __future__ import annotations

import importlib
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from esft.errors import InputError, first_line
from esft.storage.files import write_text
from esft.storage.reading import read_text

BOARD = "tensorboard"  # the folder of TensorBoard's events
WANDB = "wandb_id.txt"  # what Weights & Biases knows the run by: one that goes on is the same there

Report = Callable[[int, Mapping[str, float]], None]


@contextmanager
def reporting(to: str, folder: Path, done: int, about: Mapping[str, Any]) -> Iterator[Report]:
    """A function that shows the figures of a step.

    Args:
        to: "tensorboard", "wandb" or "none".
        folder: of the run.
        done: steps that the run has done; what is shown of later ones is taken back, which wandb cannot: there the
            first figures of a step stand.
        about: the settings.

    Raises InputError for what wandb refuses.
    """
    if to == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(folder / BOARD), purge_step=done + 1) as events:

            def add(step: int, values: Mapping[str, float]) -> None:
                for name, value in values.items():
                    events.add_scalar(name, value, step)

            yield add
    elif to == "wandb":
        with _wandb_run(folder, done, about) as run:
            yield lambda step, values: run.log(dict(values), step=step)
    else:
        yield lambda step, values: None


def check_reporting(to: str) -> None:
    """Raise InputError where the library is not installed."""
    if to == "wandb":
        _wandb()


def _wandb() -> Any:
    try:
        return importlib.import_module("wandb")
    except ModuleNotFoundError as error:
        raise InputError("report_to wandb needs the wandb package: pip install 'esft[wandb]'") from error


def _wandb_run(folder: Path, done: int, about: Mapping[str, Any]) -> Any:
    """A run that is begun there, or goes on. Where its files go, and whether it is offline, is wandb's to say."""
    kept = folder / WANDB
    if not (done and kept.is_file()):
        write_text(kept, uuid.uuid4().hex)
    project = os.environ.get("WANDB_PROJECT", "esft")
    try:
        return _wandb().init(
            project=project, name=folder.name, id=read_text(kept).strip(), resume="allow", config=dict(about)
        )
    except Exception as error:  # without a login, without a network, with an id that it does not like
        raise InputError(f"report_to wandb: {first_line(error)}") from error

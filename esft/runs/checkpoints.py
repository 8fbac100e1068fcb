"""What a run resumes from: its state after a step, and how one that is damaged is told."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from esft.errors import InputError
from esft.runs.config import TrainConfig
from esft.selection import ExpertSelection
from esft.storage.files import file_digest, open_safetensors, value_digest, write_json
from esft.storage.outputs import new_folder
from esft.storage.reading import read_json

KEPT = 2  # the last one, and the one before it for the case that the last is damaged
RECENT = 20  # steps whose mean stands for the loss of now
LATER = ("tokenizer", "chat template")  # digests that runs of before do not have
_TENSORS, _STATE = "state.safetensors", "state.json"
_NAME = re.compile(r"step-(\d{6,})")


@dataclass(frozen=True)
class Best:
    """The best of a run's evaluations so far.

    Attributes:
        step: that it came after, and ``value`` what it measured.
        stale: how many have come since one was better than the best before it by more than a threshold.
        seen: the step of the last one that this covers.
    """

    step: int
    value: float
    stale: int
    seen: int


@dataclass(frozen=True)
class State:
    """A run after a step, counted from 1: the optimizer's tensors, and the losses of the last ``RECENT`` steps.

    ``best`` is None before the first evaluation after a step. ``parts`` names those tensors of which this rank has only
    its own experts' part.
    """

    step: int
    losses: list[float]
    tensors: Mapping[str, Tensor]
    best: Best | None = None
    parts: frozenset[str] = frozenset()


def _name(step: int) -> str:
    return f"step-{step:06d}"


def digests_of(config: TrainConfig, selection: ExpertSelection | None) -> dict[str, str]:
    """Of the settings and the selection that a run is begun with.

    The number of steps may change, and settings that stand at their default do not enter: there may be more of them one
    day.
    """
    usual = {each.name: each.default for each in fields(config)}
    chosen = {name: value for name, value in asdict(config).items() if name != "steps" and value != usual[name]}
    trained = None
    if selection is not None:
        layers = {str(layer): list(ids) for layer, ids in selection.experts.items()}
        trained = [layers, selection.shared_experts, selection.non_expert_modules]
    return {"settings": value_digest(chosen), "selection": value_digest(trained)}


class Checkpoints:
    """The checkpoints of one run: ``step-N/`` with tensors and, in JSON, the step, the losses and digests of all.

    Args:
        folder: holds them.
        run: digests of what the run was begun with, which every checkpoint repeats.
    """

    def __init__(self, folder: Path, run: Mapping[str, str]):
        self.folder, self.run = folder, dict(run)

    def save(self, state: State) -> None:
        """Write one; those before it go when it is whole, but for the last, and for what either of both calls best."""
        with new_folder(self.folder / _name(state.step), lambda _: (_TENSORS, _STATE)) as folder:
            save_file({name: tensor.contiguous() for name, tensor in state.tensors.items()}, folder / _TENSORS)
            values: dict[str, Any] = {"step": state.step, "losses": state.losses, "run": self.run}
            if state.best is not None:
                values["best"] = asdict(state.best)
            values["tensors"] = file_digest(folder / _TENSORS)
            write_json(folder / _STATE, values | {"digest": value_digest(values)})
        found = [(step, path) for step, path in self._found() if step <= state.step]
        best = {_best_of(path) for _, path in found[-KEPT:]}
        for path in [path for step, path in found[:-KEPT] if step not in best]:
            for name in (_TENSORS, _STATE):
                (path / name).unlink(missing_ok=True)
            with suppress(OSError):  # holds something else
                path.rmdir()

    def read(self, step: int) -> State:
        """One of them. Raises InputError naming the file that is not as it was written, or not there."""
        return self._read(step, self.folder / _name(step))

    def last_step(self) -> int:
        """The step of the last one, whatever its state; 0 without one."""
        return max((step for step, _ in self._found()), default=0)

    def restore(self, load: Callable[[State], None]) -> State | None:
        """Hand the last sound state to ``load``, which raises InputError for one that does not fit. None without any.

        A damaged checkpoint is named in a warning, and the one before it is used. Raises InputError naming the last one
        when all are damaged.
        """
        damaged: list[InputError] = []
        for step, path in reversed(self._found()):
            try:
                state = self._read(step, path)
                _loaded(load, state, path / _TENSORS)
            except InputError as error:
                damaged.append(error)
                continue
            for error in damaged:
                warnings.warn(f"a checkpoint is damaged, the run goes on from {path.name}: {error}", stacklevel=2)
            return state
        if damaged:
            raise InputError(f"{damaged[0]}; no other checkpoint is sound, begin the run again (`overwrite=True`)")
        return None

    def _found(self) -> list[tuple[int, Path]]:
        """Steps and folders, the earliest first; what is named otherwise is nobody's business here.

        Raises InputError for a link to one: what it leads to would be replaced, and cleared away in time.
        """
        paths = self.folder.iterdir() if self.folder.is_dir() else ()
        steps = {int(name[1]): path for path in paths if (name := _NAME.fullmatch(path.name)) and path.is_dir()}
        found = sorted((step, path) for step, path in steps.items() if path.name == _name(step))
        if link := next((path for _, path in found if path.is_symlink()), None):
            raise InputError(f"{link}: is a link, where a run has a folder of its own")
        return found

    def _read(self, step: int, path: Path) -> State:
        """A checkpoint's state. Raises InputError naming the file that is not as it was written."""
        file = path / _STATE
        values = read_json(file)
        if not isinstance(values, dict) or values.get("step") != step or type(values["step"]) is not int:
            raise InputError(f"{file}: is not the state after step {step}")
        losses, best = values.get("losses", []), None
        if values.keys() != {"step"}:  # as runs of before these digests have it
            if values.pop("digest", None) != value_digest(values):
                raise InputError(f"{file}: is not as it was written (digest)")
            if not self._is_of_run(values.get("run")):
                raise InputError(f"{file}: is of another run, or its settings or selection were changed")
            best = _best(values.get("best"), step, file)
            numbers = isinstance(losses, list) and all(type(x) is float for x in losses)
            if not (numbers and math.isfinite(sum(losses))):
                raise InputError(f"{file}: losses must be a list of numbers")
            if values.get("tensors") != _digest_or_none(path / _TENSORS):
                raise InputError(f"{path / _TENSORS}: is not as it was written (digest)")
        with open_safetensors(path / _TENSORS) as handle:
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        return State(step, losses, tensors, best)

    def _is_of_run(self, digests: Any) -> bool:
        """Whether a checkpoint's digests are the run's; it may be older than some of those."""
        later = {name: self.run[name] for name in LATER if name in self.run}
        return isinstance(digests, dict) and later | digests == self.run


def _loaded(load: Callable[[State], None], state: State, file: Path) -> None:
    """Hand a state to what it is for. Raises InputError with the file in front where it does not fit."""
    try:
        load(state)
    except InputError as error:
        raise InputError(f"{file}: {error}") from error


def _best(values: Any, step: int, file: Path) -> Best | None:
    """What a checkpoint says is best. Raises InputError for what says nothing."""
    if values is None:
        return None
    kinds = {"step": int, "value": float, "stale": int, "seen": int}
    fits = isinstance(values, dict) and {name: type(value) for name, value in values.items()} == kinds
    if not (fits and 0 < values["step"] <= values["seen"] <= step and values["stale"] >= 0):
        raise InputError(f"{file}: does not say which step is best")
    return Best(**values)


def _best_of(path: Path) -> int | None:
    """The step that a checkpoint calls best, whatever else is wrong with it."""
    try:
        step: Any = read_json(path / _STATE)["best"]["step"]
    except (InputError, LookupError, TypeError):
        return None
    return step if type(step) is int else None


def _digest_or_none(path: Path) -> str | None:
    return file_digest(path) if path.is_file() else None

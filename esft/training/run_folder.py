"""The folder of a run: what it was begun with, its metrics, its checkpoints, its summary."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from esft.errors import InputError
from esft.files import check_new_folder, new_folder, write_json
from esft.reading import parse_json, read_json, read_text
from esft.selection import ExpertSelection
from esft.training.config import TrainConfig

CONFIG = "config.yaml"
SELECTION = "experts.json"
ORIGIN = "origin.json"
METRICS = "metrics.jsonl"
SUMMARY = "summary.json"
_CHECKPOINTS, _TENSORS, _STATE = "checkpoints", "state.safetensors", "state.json"


class RunFolder:
    """One run's files, for the loop that writes them and for whoever reads them.

    Attributes:
        path: the folder. It holds ``config.yaml``, ``origin.json`` (base and data, with digests), ``experts.json``
            where experts were selected, ``metrics.jsonl``, TensorBoard events, ``checkpoints/``, the outcome of the
            method and ``summary.json``.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def check_free(self, resume: bool, overwrite: bool) -> None:
        """Raise InputError unless a run can be begun here, or gone on with, or replaced."""
        if resume and overwrite:
            raise InputError("resume and overwrite exclude each other")
        if resume and not (self._holds(CONFIG) and self._holds(ORIGIN)):
            raise InputError(f"{self.path}: holds no run to resume")
        check_new_folder(self.path, overwrite=resume or overwrite)
        if overwrite and self.path.exists() and any(self.path.iterdir()) and not self._holds(CONFIG):
            raise InputError(f"{self.path}: holds no run, and is not overwritten")

    def _holds(self, name: str) -> bool:
        return (self.path / name).is_file()

    def begin(self, config: TrainConfig, origin: dict[str, Any], selection: ExpertSelection | None) -> None:
        """Write what the run is begun with; what the folder held is replaced, unless it is this very run."""
        self.path.mkdir(parents=True, exist_ok=True)
        config.save(self.path / CONFIG)
        write_json(self.path / ORIGIN, origin)
        if selection is not None:
            selection.save(self.path / SELECTION)

    def clear(self) -> None:
        """Remove an earlier run, with everything in its folder."""
        if self.path.exists():
            shutil.rmtree(self.path)

    def begun_with(
        self, config: TrainConfig | None, selection: ExpertSelection | None
    ) -> tuple[TrainConfig, ExpertSelection | None]:
        """The settings and the selection to go on with. Raises InputError where the given ones are not the run's."""
        begun = TrainConfig.load(self.path / CONFIG)
        if config is not None:
            config.check_resumes(begun)
        chosen = ExpertSelection.load(self.path / SELECTION) if self._holds(SELECTION) else None
        if selection is not None and selection != chosen:
            raise InputError(f"cannot resume with another expert selection than {self.path / SELECTION}")
        return config or begun, chosen

    def check_origin(self, digests: Mapping[str, str], paths: Mapping[str, str | Path]) -> None:
        """Raise InputError where the run was begun with another model or other data than these."""
        begun = read_json(self.path / ORIGIN)["digests"]
        for name, path in paths.items():
            if begun[name] != digests[name]:
                raise InputError(f"cannot resume with {name} {path}: the run was begun with another")

    @contextmanager
    def log(self, done: int) -> Iterator[Callable[..., None]]:
        """A function ``log(step, **values)`` that adds a line to the metrics and points to TensorBoard's events.

        Args:
            done: steps that the run has done; TensorBoard forgets what it has of later ones.
        """
        with (
            open(self.path / METRICS, "a", encoding="utf-8") as metrics,
            SummaryWriter(str(self.path / "tensorboard"), purge_step=done + 1) as board,
        ):

            def log(step: int, **values: float) -> None:
                print(json.dumps({"step": step, **values}), file=metrics, flush=True)
                for name, value in values.items():
                    board.add_scalar(name, value, step)

            yield log

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of the metrics file. Raises InputError naming file and line."""
        path = self.path / METRICS
        if not path.is_file():
            raise InputError(f"{self.path}: not a run folder (no {METRICS})")
        lines = []
        for number, line in enumerate(read_text(path).splitlines(), 1):
            values = parse_json(line, f"{path}: line {number}", lines=False)
            if not isinstance(values, dict) or not isinstance(values.get("step"), int):
                raise InputError(f"{path}: line {number}: names no step")
            if "loss" in values and not {"lr", "tokens_per_second"} <= values.keys():
                raise InputError(f"{path}: line {number}: a loss without lr and tokens_per_second")
            lines.append(values)
        return lines

    def _forget_after(self, step: int) -> None:
        """Drop the metrics of later steps, which happen again; the last line of a broken run may be torn."""
        path = self.path / METRICS
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        path.write_text("".join(line + "\n" for line in lines if _logged_by(line, step)), encoding="utf-8")

    def _checkpoints(self) -> list[tuple[int, Path]]:
        """The checkpoints' steps and folders, the earliest first."""
        found = (self.path / _CHECKPOINTS).glob("step-*")
        return sorted((int(path.name.removeprefix("step-")), path) for path in found)

    def save_checkpoint(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Write what a run resumes from; the checkpoints before it go when this one is whole."""
        with new_folder(self.path / _CHECKPOINTS / f"step-{step:06d}", overwrite=True) as folder:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / _TENSORS)
            write_json(folder / _STATE, {"step": step})
        for earlier, path in self._checkpoints():
            if earlier < step:
                shutil.rmtree(path)

    def resume(self) -> tuple[int, dict[str, Tensor]]:
        """The last checkpoint's step and tensors, 0 and none without one; metrics of later steps are dropped."""
        step, tensors = 0, {}
        if checkpoints := self._checkpoints():
            folder = checkpoints[-1][1]
            step, tensors = read_json(folder / _STATE)["step"], load_file(folder / _TENSORS)
        self._forget_after(step)
        return step, tensors

    def write_summary(self, values: dict[str, Any]) -> None:
        write_json(self.path / SUMMARY, values)

    def summary(self) -> dict[str, Any] | None:
        """What the run measured, None before its end. Raises InputError for a file that is no summary."""
        path = self.path / SUMMARY
        values = read_json(path) if path.is_file() else None
        if values is not None and not isinstance(values, dict):
            raise InputError(f"{path}: not a run's summary")
        return values


def _logged_by(line: str, step: int) -> bool:
    try:
        return json.loads(line)["step"] <= step
    except json.JSONDecodeError:
        return False

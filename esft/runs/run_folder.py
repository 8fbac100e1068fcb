"""The folder of a run: what it was begun with, its metrics, its checkpoints, its summary, its outcome."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from esft.errors import DiskError, InputError
from esft.runs.checkpoints import Checkpoints, digest_of
from esft.runs.config import TrainConfig
from esft.selection import ExpertSelection
from esft.storage.files import TEMPORARY, write_json, write_text, write_yaml
from esft.storage.locks import locked
from esft.storage.outputs import check_new_folder, entries, new_folder, recover
from esft.storage.reading import parse_json, read_json, read_text, shown

MARKER = "esft_run.json"
FORMAT_VERSION = 1
LARGEST = 1e300  # of a figure in the metrics, so that sums of some stay numbers
CONFIG = "config.yaml"
SELECTION = "experts.json"
ORIGIN = "origin.json"
METRICS = "metrics.jsonl"
SUMMARY = "summary.json"
LOCK = ".esft.lock"
ADAPTER, MODEL = "adapter", "model"  # the outcome is one of these
NEXT = "overwriting"  # a run that takes this one's place when it is whole, in a folder of its own within this one's
REPLACED = "replaced"  # in that one, while it takes the place: what it replaces
_BOARD, _CHECKPOINTS = "tensorboard", "checkpoints"
# What a run consists of, but for its outcome.
_BEGINNING = re.compile("|".join((*map(re.escape, (MARKER, CONFIG, SELECTION, LOCK)), TEMPORARY.pattern)))
_OWN = re.compile(
    "|".join(
        (
            _BEGINNING.pattern,
            *map(re.escape, (ORIGIN, METRICS, SUMMARY)),
            rf"{_BOARD}(/events\.out\.tfevents\.[^/]*)?",
            rf"{_CHECKPOINTS}(/step-\d+(/state\.(json|safetensors))?)?",
        )
    )
)
_STEP = re.compile(r"step-\d+")
_OUTCOME = re.compile(f"{ADAPTER}|{MODEL}")
# What the outcome of a run consists of that was begun before runs kept a list.
_UNLISTED = re.compile(rf"({_OUTCOME.pattern})/(README\.md|(merges|vocab)\.txt|[^/]*\.(json|safetensors|jinja|model))")


class RunFolder:
    """One run's files, for the loop that writes them and for whoever reads them.

    Attributes:
        path: the folder. It holds ``esft_run.json`` (its marker, which lists the outcome's files), ``config.yaml``,
            ``origin.json`` (base and data; digests), ``experts.json`` where experts were selected, ``metrics.jsonl``,
            TensorBoard events, ``checkpoints/``, the outcome of the method and ``summary.json``.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def holds(self, name: str) -> bool:
        """Whether a file is there. Raises InputError for a folder in its place."""
        if (self.path / name).is_dir():
            raise InputError(f"{self.path / name}: is a folder, where a run has a file")
        return (self.path / name).is_file()

    @property
    def begun(self) -> bool:
        """Whether all is there that a run is begun with: the origin is written last."""
        return self.holds(CONFIG) and self.holds(ORIGIN)

    @property
    def broken_off(self) -> bool:
        """Whether there is nothing, or no more than a kill leaves of a run before its first step."""
        found = list(entries(self.path)) if self.path.is_dir() else []
        nothing = all(entry == LOCK or TEMPORARY.fullmatch(entry) for entry in found)
        return nothing or (self.holds(MARKER) and all(map(_BEGINNING.fullmatch, found)))

    def check_ours(self) -> None:
        """Raise InputError naming the first file that no run has written."""
        outcome = self._outcome
        for entry in entries(self.path):
            if entry.startswith((f"{NEXT}/", f"{REPLACED}/")):
                continue
            if not (entry in (NEXT, REPLACED) or entry in outcome or _OWN.fullmatch(entry)):
                raise InputError(f"{self.path}: holds {entry}, which no run has written; move it elsewhere first")
        if (self.path / NEXT).is_dir():
            RunFolder(self.path / NEXT).check_ours()

    @property
    def _outcome(self) -> set[str]:
        """The files of the outcome, as paths below the run's. Raises InputError where the marker is none."""
        if not self.holds(MARKER):
            unlisted = entries(self.path) if self.path.is_dir() else ()
            return {entry for entry in unlisted if _UNLISTED.fullmatch(entry)}
        marker = read_json(self.path / MARKER)
        files = marker.get("outcome") if isinstance(marker, dict) else None
        if not isinstance(files, list) or not all(isinstance(file, str) for file in files):
            raise InputError(f"{self.path / MARKER}: is no run's marker")
        if marker.get("format_version") != FORMAT_VERSION:
            raise InputError(f"{self.path / MARKER}: format_version must be {FORMAT_VERSION}")
        return set(files)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run for the block; folders that are made for that go again where they are still empty.

        Raises InputError naming the process that holds it.
        """
        made = [path for path in (self.path, *self.path.parents) if not path.exists()]
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            with locked(self.path / LOCK, self.path):
                yield
        finally:
            for path in made:
                if path.is_dir() and not any(path.iterdir()):
                    path.rmdir()

    def recover(self) -> None:
        """Clear away what a crash has left, of a run that is locked."""
        recover(self.path, _OUTCOME)
        recover(self.path / _CHECKPOINTS, _STEP)
        for path in self.path.iterdir():
            if TEMPORARY.fullmatch(path.name) and path.is_file():
                path.unlink()

    def begin(self, config: TrainConfig, origin: dict[str, Any], selection: ExpertSelection | None) -> None:
        """Write what the run is begun with, the origin last: without it no run has begun."""
        self.path.mkdir(parents=True, exist_ok=True)
        self._mark(self._outcome)
        digests = origin["digests"] | _digests(config, selection)
        write_yaml(self.path / CONFIG, asdict(config))
        if selection is not None:
            selection.save(self.path / SELECTION)
        else:
            (self.path / SELECTION).unlink(missing_ok=True)
        write_json(self.path / ORIGIN, origin | {"digests": digests})

    def origin(self) -> dict[str, Any]:
        """Base and data with their digests, and those of settings and selection. Raises InputError for another file."""
        path = self.path / ORIGIN
        origin = read_json(path)
        digests = origin.get("digests") if isinstance(origin, dict) else None
        if not isinstance(digests, dict) or not digests.keys() >= {"model", "data"}:
            raise InputError(f"{path}: does not say what the run was begun with")
        return origin

    def begun_with(
        self, config: TrainConfig | None, selection: ExpertSelection | None
    ) -> tuple[TrainConfig, ExpertSelection | None]:
        """The settings and the selection to go on with.

        Raises InputError where the given ones are not the run's, where the run's own were changed since it was begun,
        and for fewer steps than are done.
        """
        begun = TrainConfig.load(self.path / CONFIG)
        chosen = ExpertSelection.load(self.path / SELECTION) if self.holds(SELECTION) else None
        digests = self.origin()["digests"]
        for name, value in _digests(begun, chosen).items():
            if digests.get(name, value) != value:  # runs of before have no such digests
                raise InputError(f"{self.path / _FILES[name]}: was changed since the run was begun")
        if config is not None:
            config.check_resumes(begun)
        if selection is not None and selection != chosen:
            raise InputError(f"cannot resume with another expert selection than {self.path / SELECTION}")
        config = config or begun
        done = max(self.checkpoints().last_step(), (self.summary() or {}).get("steps", 0))
        if config.steps < done:
            raise InputError(f"cannot resume with steps {config.steps}: {self.path} has done {done}")
        return config, chosen

    def check_origin(self, digests: Mapping[str, str], paths: Mapping[str, str | Path]) -> None:
        """Raise InputError where the run was begun with another model or other data than these."""
        begun = self.origin()["digests"]
        for name, path in paths.items():
            # Runs of before have the first part of the model's digest alone.
            if begun[name] not in (digests[name], digests[name].partition("-")[0]):
                raise InputError(f"cannot resume with {name} {path}: the run was begun with another")

    def checkpoints(self) -> Checkpoints:
        """What the run resumes from."""
        return Checkpoints(self.path / _CHECKPOINTS, self.origin()["digests"])

    @contextmanager
    def log(self, done: int) -> Iterator[Callable[..., None]]:
        """A function ``log(step, **values)`` that adds a line to the metrics and points to TensorBoard's events.

        Args:
            done: steps that the run has done; metrics and TensorBoard forget what they have of later ones.
        """
        lines = [line for line in self.metrics(torn=True) if line["step"] <= done] if self.holds(METRICS) else []
        write_text(self.path / METRICS, "".join(json.dumps(line) + "\n" for line in lines))
        with (
            open(self.path / METRICS, "a", encoding="utf-8") as metrics,
            SummaryWriter(str(self.path / _BOARD), purge_step=done + 1) as board,
        ):

            def log(step: int, **values: float) -> None:
                try:
                    print(json.dumps({"step": step, **values}), file=metrics, flush=True)
                except OSError as error:
                    raise DiskError(f"{self.path / METRICS}: {error.strerror or error}") from error
                for name, value in values.items():
                    board.add_scalar(name, value, step)

            yield log

    def metrics(self, torn: bool = False) -> list[dict[str, Any]]:
        """The lines of the metrics file.

        Args:
            torn: leave out a last line that a kill has cut short.

        Raises InputError naming file and line.
        """
        path = self.path / METRICS
        if not path.is_file():
            raise InputError(f"{self.path}: not a run folder (no {METRICS})")
        text, lines = read_text(path), []
        for number, line in enumerate(text.splitlines(), 1):
            where = f"{path}: line {number}"
            try:
                values = parse_json(line, where, lines=False)
            except InputError:
                if torn and not text.endswith("\n") and number == len(text.splitlines()):
                    break
                raise
            if not isinstance(values, dict) or type(values.get("step")) is not int or values["step"] < 1:
                raise InputError(f"{where}: names no step")
            for name, value in values.items():
                if type(value) not in (int, float) or not abs(value) <= LARGEST:
                    raise InputError(f"{where}: {name} is {shown(value)}, no number")
            if "loss" in values and not {"lr", "tokens_per_second"} <= values.keys():
                raise InputError(f"{where}: a loss without lr and tokens_per_second")
            lines.append(values)
        return lines

    @contextmanager
    def outcome(self, name: str) -> Iterator[Path]:
        """A folder for what was trained, ``ADAPTER`` or ``MODEL``, which appears in the run when it is whole."""
        with new_folder(self.path / name, lambda _: self._outcome_in(name)) as folder:
            yield folder
            self._mark(self._outcome | {f"{name}/{entry}" for entry in entries(folder)})

    def check_outcome(self) -> None:
        """Raise InputError where the outcome of a run that goes on holds what is no part of it."""
        for name in (ADAPTER, MODEL):
            check_new_folder(self.path / name, lambda _, name=name: self._outcome_in(name))

    def _outcome_in(self, name: str) -> set[str]:
        return {file.removeprefix(f"{name}/") for file in self._outcome if file.startswith(f"{name}/")}

    def _mark(self, outcome: set[str]) -> None:
        write_json(self.path / MARKER, {"format_version": FORMAT_VERSION, "outcome": sorted(outcome)})

    def stored_bytes(self) -> int:
        """Of the outcome's tensors."""
        return sum((self.path / file).stat().st_size for file in self._outcome if file.endswith(".safetensors"))

    def write_summary(self, measured: dict[str, Any]) -> None:
        """What the run measured, after what it was begun with."""
        method, origin = TrainConfig.load(self.path / CONFIG).method, self.origin()
        write_json(
            self.path / SUMMARY, {"method": method, "model": origin["model"], "data": origin["data"], **measured}
        )

    def summary(self) -> dict[str, Any] | None:
        """What the run measured, None before its end. Raises InputError for a file that is no summary."""
        path = self.path / SUMMARY
        values = read_json(path) if self.holds(SUMMARY) else None
        if values is not None and (not isinstance(values, dict) or type(values.get("steps", 0)) is not int):
            raise InputError(f"{path}: not a run's summary")
        return values


_FILES = {"settings": CONFIG, "selection": SELECTION}


def _digests(config: TrainConfig, selection: ExpertSelection | None) -> dict[str, str]:
    """Of the settings and the selection.

    The number of steps may change, and settings that stand at their default do not enter: there may be more of them one
    day.
    """
    usual = {each.name: each.default for each in fields(config)}
    chosen = {name: value for name, value in asdict(config).items() if name != "steps" and value != usual[name]}
    trained = None
    if selection is not None:
        layers = {str(layer): list(ids) for layer, ids in selection.experts.items()}
        trained = [layers, selection.shared_experts, selection.non_expert_modules]
    return {"settings": digest_of(chosen), "selection": digest_of(trained)}

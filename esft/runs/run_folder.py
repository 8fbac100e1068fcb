"""The folder of a run: what it was begun with, its metrics, its checkpoints, its summary, its outcome."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from esft.errors import DiskError, InputError
from esft.runs.checkpoints import Checkpoints, digests_of
from esft.runs.config import TrainConfig
from esft.runs.metrics import logging, read_metrics
from esft.runs.reporting import BOARD, WANDB, reporting
from esft.selection import ExpertSelection
from esft.storage.files import TEMPORARY, write_json, write_yaml
from esft.storage.locks import locked
from esft.storage.outputs import RUN_MARKER, check_new_folder, entries, new_folder, recover
from esft.storage.reading import check_name, read_json, shown

FORMAT_VERSION = 1
CONFIG = "config.yaml"
SELECTION = "experts.json"
ORIGIN = "origin.json"
METRICS = "metrics.jsonl"
SUMMARY = "summary.json"
LOCK = ".esft.lock"
ADAPTER, MODEL = "adapter", "model"  # the outcome is one of these
NEXT = "overwriting"  # a run that takes this one's place when it is whole, in a folder of its own within this one's
REPLACED = "replaced"  # in that one, while it takes the place: what it replaces
_CHECKPOINTS = "checkpoints"
# What a run consists of, but for its outcome.
_BEGINNING = re.compile("|".join((*map(re.escape, (RUN_MARKER, CONFIG, SELECTION, LOCK)), TEMPORARY.pattern)))
_OWN = re.compile(
    "|".join(
        (
            _BEGINNING.pattern,
            *map(re.escape, (ORIGIN, METRICS, SUMMARY, WANDB)),
            rf"{BOARD}(/events\.out\.tfevents\.[^/]*)?",
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
        """Raises InputError for what is no path."""
        check_name(path)
        self.path = Path(path)

    def holds(self, name: str) -> bool:
        """Whether a file is there. Raises InputError for anything else in its place, links included."""
        path = self.path / name
        if path.is_symlink() or (os.path.lexists(path) and not path.is_file()):
            raise InputError(f"{path}: is no regular file, where a run has one")
        return path.is_file()

    @property
    def begun(self) -> bool:
        """Whether all is there that a run is begun with: the origin is written last."""
        return self.holds(CONFIG) and self.holds(ORIGIN)

    @property
    def why_not_begun(self) -> str:
        """For the message about a run that cannot go on; empty where there is none at all."""
        if not self.holds(RUN_MARKER):
            return ""
        if self.broken_off:
            return ", it was broken off before its first step: begin it again"
        return f", as it lacks {ORIGIN if self.holds(CONFIG) else CONFIG}"

    @property
    def broken_off(self) -> bool:
        """Whether there is nothing, or no more than a kill leaves before a first step. Raises what ``holds`` does."""
        found = list(entries(self.path)) if self.path.is_dir() else []
        nothing = all(entry == LOCK or TEMPORARY.fullmatch(entry) for entry in found)
        beginning = self.holds(RUN_MARKER) and all(map(_BEGINNING.fullmatch, found))
        return nothing or (beginning and all(map(self.holds, found)))  # which are written anew

    def check_ours(self, within: str = NEXT) -> None:
        """Raise InputError naming the first file that no run has written.

        Args:
            within: the folder that holds another run: one that follows, which is looked at too, or what is replaced.
        """
        outcome = self._outcome
        for entry in entries(self.path):
            other = entry == within or entry.startswith(f"{within}/")
            if not (other or entry in outcome or _OWN.fullmatch(entry)):
                raise InputError(f"{self.path}: holds {entry}, which no run has written; move it elsewhere first")
        if within == NEXT and (self.path / NEXT).is_dir():
            RunFolder(self.path / NEXT).check_ours(REPLACED)

    @property
    def _outcome(self) -> set[str]:
        """The files of the outcome, as paths below the run's. Raises InputError where the marker is none."""
        if not self.holds(RUN_MARKER):
            unlisted = entries(self.path) if self.path.is_dir() else ()
            return {entry for entry in unlisted if _UNLISTED.fullmatch(entry)}
        marker = read_json(self.path / RUN_MARKER)
        files = marker.get("outcome") if isinstance(marker, dict) else None
        if not isinstance(files, list) or not all(isinstance(file, str) for file in files):
            raise InputError(f"{self.path / RUN_MARKER}: is no run's marker")
        if type(version := marker.get("format_version")) is not int or version != FORMAT_VERSION:
            raise InputError(f"{self.path / RUN_MARKER}: format_version must be {FORMAT_VERSION}")
        return set(files)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run for the block; folders that are made for that go again where they are still empty.

        Raises InputError naming the process that holds it, DiskError where no folder can be made.
        """
        made = [path for path in (self.path, *self.path.parents) if not path.exists()]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DiskError(f"{self.path}: {error.strerror or error}") from error
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
        digests = origin["digests"] | digests_of(config, selection)
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
        values = origin if isinstance(origin, dict) else {}
        digests = values.get("digests")
        texts = [values.get("model"), values.get("data"), *(digests.values() if isinstance(digests, dict) else [None])]
        if not isinstance(digests, dict) or not all(isinstance(text, str) for text in texts):
            raise InputError(f"{path}: does not say what the run was begun with")
        if not digests.keys() >= {"model", "data"} or not isinstance(values.get("base_settings", {}), dict):
            raise InputError(f"{path}: does not say what the run was begun with")
        return values

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
        for name, value in digests_of(begun, chosen).items():
            if digests.get(name, value) != value:  # runs of before have no such digests
                raise InputError(f"{self.path / _FILES[name]}: was changed since the run was begun")
        if config is not None:
            config.check_resumes(begun)
        if selection is not None and selection != chosen:
            raise InputError(f"cannot resume with another expert selection than {self.path / SELECTION}")
        config = config or begun
        if self.holds(METRICS):
            self.metrics(torn=True)
        done = max(self.checkpoints().last_step(), (self.summary() or {}).get("steps", 0))
        if config.steps < done:
            raise InputError(f"cannot resume with steps {config.steps}: {self.path} has done {done}")
        return config, chosen

    def check_origin(
        self, digests: Mapping[str, str], settings: Mapping[str, Any], paths: Mapping[str, str | Path]
    ) -> None:
        """Raise InputError where the run was begun with another model or other data than these.

        Args:
            digests: of the model's weights and of the data, and of its parts by what they are called.
            settings: what the model's forward pass depends on; one that only one of the two has is passed over.
            paths: of both, for the message.
        """
        origin = self.origin()
        begun, theirs = origin["digests"], origin.get("base_settings", {})
        for name, path in paths.items():
            # Runs of before have the first part of the model's digest alone.
            if begun.get(name) not in (digests[name], digests[name].partition("-")[0]):
                raise InputError(f"cannot resume with {name} {path}: the run was begun with another")
        for part in sorted(digests.keys() - paths.keys()):
            if begun.get(part, digests[part]) != digests[part]:  # runs of before have none of these
                raise InputError(f"cannot resume with model {paths['model']}: the run was begun with another {part}")
        for name, value in settings.items():
            if (before := theirs.get(name, value)) != value:
                said = f"its {name} is {shown(value)}, and was {shown(before)} when the run was begun"
                raise InputError(f"cannot resume with model {paths['model']}: {said}")

    def checkpoints(self) -> Checkpoints:
        """What the run resumes from."""
        return Checkpoints(self.path / _CHECKPOINTS, self.origin()["digests"])

    @contextmanager
    def log(self, done: int) -> Iterator[Callable[..., None]]:
        """``logging`` of this run, which has done so many steps, shown as its settings say."""
        config = TrainConfig.load(self.path / CONFIG)
        with (
            reporting(config.report_to, self.path, done, asdict(config)) as report,
            logging(self.path / METRICS, done, report) as log,
        ):
            yield log

    def metrics(self, torn: bool = False) -> list[dict[str, Any]]:
        """``read_metrics`` of this run. Raises InputError for a folder that is none of a run, too."""
        if not self.holds(METRICS):
            raise InputError(f"{self.path}: not a run folder (no {METRICS})")
        return read_metrics(self.path / METRICS, torn)

    def last_step(self) -> int:
        """The last step in the metrics, 0 without any."""
        lines = self.metrics(torn=True) if self.holds(METRICS) else []
        return lines[-1]["step"] if lines else 0

    @contextmanager
    def outcome(self, name: str) -> Iterator[Path]:
        """A folder for what was trained, ``ADAPTER`` or ``MODEL``, which appears in the run when it is whole."""
        with new_folder(self.path / name, lambda _: self._outcome_in(name)) as folder:
            yield folder
            self._mark(self._outcome | {f"{name}/{entry}" for entry in entries(folder)})

    def check_outcome(self) -> None:
        """Raise InputError where the outcome of a run that goes on holds what is no part of it."""
        self.holds(WANDB)  # written through a link; the run's other files are read before
        for name in (ADAPTER, MODEL):
            if (self.path / name).is_symlink():
                raise InputError(f"{self.path / name}: is a link, where a run has a folder of its own")
            check_new_folder(self.path / name, lambda _, name=name: self._outcome_in(name))

    def _outcome_in(self, name: str) -> set[str]:
        return {file.removeprefix(f"{name}/") for file in self._outcome if file.startswith(f"{name}/")}

    def _mark(self, outcome: set[str]) -> None:
        write_json(self.path / RUN_MARKER, {"format_version": FORMAT_VERSION, "outcome": sorted(outcome)})

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
        if values is not None and (not isinstance(values, dict) or not _is_count(values.get("steps", 0))):
            raise InputError(f"{path}: not a run's summary")
        return values


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


_FILES = {"settings": CONFIG, "selection": SELECTION}

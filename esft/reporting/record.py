"""Everything that a run's folder says of it, read at once."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from esft.errors import InputError
from esft.runs.config import TrainConfig
from esft.runs.metrics import LARGEST
from esft.runs.run_folder import ADAPTER, CONFIG, METRICS, SELECTION, RunFolder
from esft.selection import ExpertSelection
from esft.storage.files import FLOATS, safetensors_header
from esft.storage.reading import read_json

_MANIFEST = f"{ADAPTER}/manifest.json"


@dataclass(frozen=True)
class Line:
    """One figure over the steps of a run: ``values[i]`` after step ``steps[i]``, which rise."""

    name: str
    steps: list[int]
    values: list[float]


@dataclass(frozen=True)
class RunRecord:
    """A run, as its folder tells it.

    Attributes:
        path: the folder, as it was given.
        config: its settings.
        selection: what it trains of the model, for method "esft".
        origin: base and data, with digests.
        metrics: its lines, without one that a kill has cut short.
        summary: what it measured; None before its end.
        chosen_by: how its experts were chosen, by the adapter's manifest; empty where nobody has said it.
    """

    path: Path
    config: TrainConfig
    selection: ExpertSelection | None
    origin: dict[str, Any]
    metrics: list[dict[str, Any]]
    summary: dict[str, Any] | None
    chosen_by: dict[str, Any]

    @classmethod
    def read(cls, path: str | Path) -> RunRecord:
        """Raises InputError for a folder in which no run has begun, and naming the file that is not as a run's is."""
        folder = RunFolder(path)
        if not folder.begun:
            raise InputError(f"{path}: not the folder of a run that has begun{folder.why_not_begun}")
        selection = ExpertSelection.load(folder.path / SELECTION) if folder.holds(SELECTION) else None
        return cls(
            Path(path),
            TrainConfig.load(folder.path / CONFIG),
            selection,
            folder.origin(),
            folder.metrics(torn=True) if folder.holds(METRICS) else [],
            folder.summary(),
            _chosen_by(folder),
        )

    @property
    def lines(self) -> dict[str, Line]:
        """Every figure of the metrics, by its name; of two in one step the later counts."""
        found: dict[str, dict[int, float]] = {}
        for line in self.metrics:
            for name, value in line.items():
                if name != "step":
                    found.setdefault(name, {})[line["step"]] = value
        return {name: Line(name, list(values), list(values.values())) for name, values in found.items()}

    @property
    def measured(self) -> dict[str, Line]:
        """Of those the ones that come now and then: what an evaluation has found, and no step of its own."""
        of_steps = {name for line in self.metrics if "loss" in line for name in line}
        return {name: line for name, line in self.lines.items() if name not in of_steps}

    @property
    def steps(self) -> int:
        """Steps that are done."""
        return self.metrics[-1]["step"] if self.metrics else 0

    @property
    def figures(self) -> dict[str, float]:
        """The numbers of the summary, those of a group under both names with a point between."""
        return dict(_numbers(self.summary or {}))

    @property
    def settings(self) -> dict[str, Any]:
        """All settings in their order, with the learning rate that was meant where none is given."""
        return asdict(self.config) | {"lr": self.config.learning_rate}


def named(records: Sequence[RunRecord]) -> list[str]:
    """What to call each run: its folder's name where no other has it, else the path as it was given."""
    short = [record.path.resolve().name for record in records]
    return [n if short.count(n) == 1 else str(r.path) for n, r in zip(short, records, strict=True)]


def base_size(record: RunRecord) -> tuple[int | None, int] | None:
    """Parameters and bytes of the base's files of weights, as they lie there now.

    None where the base is not on this machine; no parameters where some are packed, so that elements do not count them.
    """
    folder = Path(record.origin["model"])
    files = sorted(folder.glob("*.safetensors")) if os.path.isdir(folder) else []  # False for what is no path, too
    if not files:
        return None
    tensors = [tensor for file in files for tensor in safetensors_header(file).values()]
    plain = all(tensor.dtype in FLOATS for tensor in tensors)
    parameters = sum(math.prod(tensor.shape) for tensor in tensors)
    return parameters if plain else None, sum(tensor.end - tensor.start for tensor in tensors)


def _chosen_by(folder: RunFolder) -> dict[str, Any]:
    manifest = read_json(folder.path / _MANIFEST) if folder.holds(_MANIFEST) else {}
    chosen_by = manifest.get("chosen_by", {}) if isinstance(manifest, dict) else None
    if not isinstance(chosen_by, dict):
        raise InputError(f"{folder.path / _MANIFEST}: does not say how the experts were chosen")
    return chosen_by


def _numbers(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _numbers(value, f"{before}{name}.")
        elif type(value) in (int, float) and abs(value) <= LARGEST:
            yield f"{before}{name}", value

"""Where records come from: a file, a folder, or a data set of the hub."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esft.data.files import SUFFIXES, read_rows
from esft.data.records import Record, as_record
from esft.errors import InputError, first_line
from esft.storage.files import file_digest
from esft.storage.reading import check_name, check_regular

SPLIT = "train"  # the usual one
# What of ``datasets`` is used: kinds of files that hold plain rows. Its others decode what they read, or run more.
_PLAIN = ("json", "parquet", "arrow", "csv")
_SPELLED = re.compile(r"(?P<path>.+?)(@(?P<split>[\w.-]+(\[[^\]]*\])?))?(:(?P<weight>\d+(\.\d*)?|\.\d+))?")
_HUB = re.compile(r"(?P<name>\w[\w.-]*/\w[\w.-]*)(/(?P<config>\w[\w.-]*))?")


@dataclass(frozen=True)
class DataSource:
    """One source of records, by ``PATH[@SPLIT][:WEIGHT]``.

    Attributes:
        path: a file (JSON lines, a JSON list, Parquet; .gz, .bz2, .xz or .zst), a folder that ``datasets`` reads, or
            ``owner/name[/configuration]`` of the hub.
        split: of a folder or of the hub's.
        weight: its share among other sources; None where nothing is said.
    """

    path: str
    split: str | None = None
    weight: float | None = None

    @classmethod
    def of(cls, text: str | Path) -> DataSource:
        """Raises InputError for what is no path, for a weight of 0, and for a split of a file."""
        check_name(text)
        if Path(text).exists() or (found := _SPELLED.fullmatch(str(text))) is None:
            return cls(str(text))
        weight = None if found["weight"] is None else float(found["weight"])
        if weight == 0:
            raise InputError(f"{text}: the weight of a source must be above 0")
        source = cls(found["path"], found["split"], weight)
        if source.split is not None and source.is_file:
            raise InputError(f"{text}: a file has no splits")
        return source

    @classmethod
    def measured(cls, text: str | Path) -> DataSource:
        """One that is measured on, each record once. Raises InputError as ``of`` does, and for a weight."""
        source = cls.of(text)
        if source.weight is not None:
            raise InputError(f"{text}: of data that is measured every record counts once, and none has a weight")
        return source

    def __str__(self) -> str:
        split = "" if self.split is None else f"@{self.split}"
        return f"{self.path}{split}" + ("" if self.weight is None else f":{self.weight:g}")

    @property
    def name(self) -> str:
        """For messages."""
        return self.path if self.split is None else f"{self.path}@{self.split}"

    @property
    def is_file(self) -> bool:
        """Whether it is a file, or can be nothing else."""
        path = Path(self.path)
        return not path.is_dir() and (path.exists() or _HUB.fullmatch(self.path) is None or path.suffix in SUFFIXES)

    @property
    def local(self) -> Path | None:
        """Its file or folder; None of the hub's."""
        return Path(self.path) if self.is_file or Path(self.path).is_dir() else None

    def check(self) -> None:
        """Raise InputError where it is a file that cannot be read: before anything slow is begun."""
        if self.is_file:
            check_regular(self.path)

    def rows(self, streaming: bool = False) -> Iterator[tuple[str, Any]]:
        """Every row and its place. Raises InputError naming what cannot be read."""
        if self.is_file:
            return read_rows(self.path)
        return _rows_of_datasets(self, streaming)

    def records(self, streaming: bool = False) -> Iterator[Record]:
        """Every record, in order. Raises InputError naming the source and the place for a row that is none."""
        return (as_record(row, self.name, place) for place, row in self.rows(streaming))

    def digest(self, streaming: bool = False) -> str:
        """Of its content: a file's bytes, else its rows, or when they are too many what ``datasets`` knows of them."""
        if self.is_file:
            return file_digest(Path(self.path))
        if streaming:
            with _reading(self):
                return hashlib.sha256(f"{self.name} {_builder(self).hash}".encode()).hexdigest()
        digest = hashlib.sha256()
        for _, row in self.rows():
            digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
        return digest.hexdigest()


def read_records(source: str | Path | DataSource) -> list[Record]:
    """The records of a source. Raises InputError as ``DataSource.records`` does, and for a source without records."""
    source = source if isinstance(source, DataSource) else DataSource.of(source)
    if not (records := list(source.records())):
        raise InputError(f"{source.name}: holds no records")
    return records


def _rows_of_datasets(source: DataSource, streaming: bool) -> Iterator[tuple[str, Any]]:
    with _reading(source):
        for number, row in enumerate(_opened(source, streaming), 1):
            yield f"record {number}", row


@contextmanager
def _reading(source: DataSource) -> Iterator[None]:
    """What ``datasets`` says inside becomes an InputError that names the source."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # of the network, the name, the split, or of a file in any format
        where = source.name if source.local else f"{source.name}: no such file or folder, and no data set of the hub's"
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error  # which some only wrap
        raise InputError(f"{where}: cannot be read ({first_line(cause)})") from error


def _opened(source: DataSource, streaming: bool) -> Any:
    """What ``datasets`` makes of a folder or a name; since its version 4 it runs no code of theirs."""
    import datasets

    path, split = Path(source.path), source.split or SPLIT
    if source.local is not None and any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        saved = datasets.load_from_disk(source.path)
        return saved[split] if isinstance(saved, datasets.DatasetDict) else saved
    _builder(source)
    return datasets.load_dataset(*_named(source), split=split, streaming=streaming)


def _named(source: DataSource) -> tuple[str, str | None]:
    """Name and configuration, as ``datasets`` takes them."""
    found = None if source.local is not None else _HUB.fullmatch(source.path)
    return (source.path, None) if found is None else (found["name"], found["config"])


def _builder(source: DataSource) -> Any:
    """What would read the source. Raises InputError where that does more than to read plain rows."""
    import datasets

    builder = datasets.load_dataset_builder(*_named(source))
    kind = type(builder).__module__.split(".")
    if kind[:2] != ["datasets", "packaged_modules"] or kind[2] not in _PLAIN:
        raise InputError(f"{source.name}: holds files of the kind {kind[-1]}; {', '.join(_PLAIN)} are read")
    return builder

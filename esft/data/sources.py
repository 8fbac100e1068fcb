"""Where records come from: a file, a folder, or a data set of the hub."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from esft.data.files import PARQUET, SUFFIXES, check_unfolds, read_rows
from esft.data.records import COLUMNS, Record, as_record
from esft.errors import InputError, first_line
from esft.storage.files import file_digest
from esft.storage.reading import check_name, check_regular, read_json, read_text, shown, texts_below

SPLIT = "train"  # the usual one
# What of ``datasets`` is used: kinds of files that hold plain rows. Its others decode what they read, or run more.
_PLAIN = ("json", "parquet", "arrow", "csv")
_SPELLED = re.compile(r"(?P<path>.+?)(@(?P<split>[\w.-]+(\[[^\]]*\])?))?(:(?P<weight>[0-9]+(\.[0-9]*)?|\.[0-9]+))?")
_LEAST, _MOST = 1e-9, 1e9  # of a weight
_CARDS = ("README.md", ".huggingface.yaml")  # of a folder: where ``datasets`` reads of which files it consists
_PLACES = ("data_files", "data_dir")  # and under which names it says so
_HEAD = re.compile(r"\s*---[\r\n]+(.*?)[\r\n]+---(?=[\r\n]|$)", re.DOTALL)  # of the first of them
_ELSEWHERE = re.compile(r"://|::|^[/\\~]|(^|[/\\])\.\.([/\\]|$)")
_UNFOLDED = {"gzip": ".gz", "bz2": ".bz2", "xz": ".xz", "zstd": ".zst"}  # by the names of ``datasets``
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
        """Raises InputError for what is no path, for a weight out of its range, and for a split of a file."""
        check_name(text)
        if Path(text).exists() or (found := _SPELLED.fullmatch(str(text))) is None:
            return cls(str(text))
        weight = None if found["weight"] is None else float(found["weight"])
        if weight is not None and not _LEAST <= weight <= _MOST:
            raise InputError(f"{shown(str(text))[1:-1]}: a source's weight must be in [{_LEAST:g}, {_MOST:g}]")
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
                return hashlib.sha256(f"{self.name} {_builder(self, streaming).hash}".encode()).hexdigest()
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
        with _silence:
            yield
    except InputError:
        raise
    except Exception as error:  # of the network, the name, the split, or of a file in any format
        where = source.name if source.local else f"{source.name}: no such file or folder, and no data set of the hub's"
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error  # which some only wrap
        raise InputError(f"{where}: cannot be read ({first_line(cause)})") from error


class _Silence:
    """``datasets``, which says all errors twice, says nothing in blocks that may begin and end in any order."""

    def __init__(self) -> None:
        self._blocks, self._before = 0, logging.WARNING

    def __enter__(self) -> None:
        import datasets

        if not self._blocks:
            self._before = datasets.logging.get_verbosity()
            datasets.logging.set_verbosity(logging.CRITICAL)
        self._blocks += 1

    def __exit__(self, *_: object) -> None:
        import datasets

        self._blocks -= 1
        if not self._blocks:
            datasets.logging.set_verbosity(self._before)


_silence = _Silence()


def _opened(source: DataSource, streaming: bool) -> Any:
    """What ``datasets`` makes of a folder or a name; since its version 4 it runs no code of theirs."""
    import datasets

    path, split = Path(source.path), source.split or SPLIT
    if source.local is not None and any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        _check_saved(path)
        saved = datasets.load_from_disk(source.path)
        rows: Any = saved[split] if isinstance(saved, datasets.DatasetDict) else saved
        return _plain(rows.with_format(None), source)
    _builder(source, streaming)
    return _plain(datasets.load_dataset(*_named(source), split=split, streaming=streaming), source)


def _plain(rows: Any, source: DataSource) -> Any:
    """Rows without the columns of which ``datasets`` decodes more than text and numbers: of a picture it opens the path
    or the address that a row names. Raises InputError where a record would be made of one."""
    decoded = {name: kind for name, feature in (rows.features or {}).items() if (kind := _decoded(feature))}
    if taken := next((name for name in decoded if name in COLUMNS), None):
        raise InputError(f"{source.name}: column {taken} is of the kind {decoded[taken]}; text is read")
    return rows.remove_columns(list(decoded)) if decoded else rows


def _decoded(feature: Any) -> str | None:
    """The name of a kind that is decoded, JSON apart, in a column's kind; None without one."""
    if isinstance(feature, dict):
        return next(filter(None, map(_decoded, feature.values())), None)
    if isinstance(feature, list | tuple):
        return next(filter(None, map(_decoded, feature)), None)
    if hasattr(feature, "feature"):
        return _decoded(feature.feature)
    name = type(feature).__name__
    return name if hasattr(feature, "decode_example") and name != "Json" else None


def _check_saved(folder: Path) -> None:
    """Raise InputError for a saved data set that names files outside its folder, or what is none."""
    parts = [folder]
    if os.path.lexists(folder / "dataset_dict.json"):
        parts = [folder / name for name in _names(folder / "dataset_dict.json", "splits")]
    for part in parts:
        state = part / "state.json"
        for key in ("_data_files", "_indices_data_files"):
            for name in _names(state, key, "filename"):
                check_regular(part / name)


def _names(path: Path, key: str, within: str | None = None) -> list[str]:
    """The names of files or folders beside it that a JSON file has in a list. Raises InputError for anything else."""
    values = read_json(path)
    found: Any = (values.get(key) or []) if isinstance(values, dict) else None
    if within is not None and isinstance(found, list):
        found = [each.get(within) if isinstance(each, dict) else each for each in found]
    if not isinstance(found, list):
        raise InputError(f"{path}: has no list {key}")
    for name in found:
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*", name):
            raise InputError(f"{path}: {key} has {shown(name)}, which is no name of what lies beside it")
    return found


def _named(source: DataSource) -> tuple[str, str | None]:
    """Name and configuration, as ``datasets`` takes them."""
    found = None if source.local is not None else _HUB.fullmatch(source.path)
    return (source.path, None) if found is None else (found["name"], found["config"])


def _builder(source: DataSource, streaming: bool) -> Any:
    """What would read the source. Raises InputError where that does more than to read plain rows of the source."""
    import datasets

    if source.local is not None:
        _check_card(source.local)
    builder = datasets.load_dataset_builder(*_named(source))
    kind = type(builder).__module__.split(".")
    if kind[:2] != ["datasets", "packaged_modules"] or kind[2] not in _PLAIN:
        raise InputError(f"{source.name}: holds files of the kind {kind[-1]}; {', '.join(_PLAIN)} are read")
    for files in (builder.config.data_files or {}).values():
        for file in files:
            _check_file(str(file), source, streaming)
    return builder


def _check_card(folder: Path) -> None:
    """Raise InputError where a folder's card says that its data is elsewhere: ``datasets`` would go there at once."""
    for path in (folder / name for name in _CARDS):
        if not os.path.lexists(path):
            continue
        text = read_text(path, "utf-8-sig")
        if path.suffix == ".md":
            head = _HEAD.match(text)
            text = head[1] if head is not None else ""
        for value in texts_below(text, _PLACES, str(path)):
            if _ELSEWHERE.search(value):
                raise InputError(f"{path}: names {shown(value)}, which is not in this folder")


def _check_file(file: str, source: DataSource, streaming: bool) -> None:
    """Raise InputError for a file that is not of the source, and for a local one that is not read as it lies there.

    What is streamed is not unfolded first, but as it is read.
    """
    if source.local is None:
        if not file.startswith("hf://"):
            raise InputError(f"{source.name}: names {shown(file)}, which is not of the hub")
        return
    path = Path(os.path.normpath(file))
    if _ELSEWHERE.search(file.removeprefix("/")) or source.local.resolve() not in path.parents:
        raise InputError(f"{source.name}: names {shown(file)}, which is not in this folder")
    check_regular(path)
    from datasets.utils.extract import Extractor

    kind = Extractor.infer_extractor_format(file)  # by what it holds, and it would be unpacked whole
    if kind is not None and kind not in _UNFOLDED:
        raise InputError(f"{path}: is an archive ({kind}), and is not read; unpack it")
    suffix = _UNFOLDED[kind] if kind is not None else path.suffix
    if (kind is not None or suffix == PARQUET) and not streaming:
        _check_unfolds_once(path, suffix, path.stat().st_size, path.stat().st_mtime_ns)


@cache
def _check_unfolds_once(path: Path, suffix: str, size: int, changed: int) -> None:
    """``check_unfolds`` of a file that has not changed since: it is read several times, and unfolding takes long."""
    check_unfolds(path, suffix)

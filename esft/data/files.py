"""Rows of a data file: JSON lines, a JSON list or Parquet, compressed or not."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from esft.data.records import COLUMNS
from esft.errors import InputError, first_line
from esft.storage.limits import JSON_BYTES, UNFOLDED, UNFOLDED_BYTES
from esft.storage.reading import check_regular, parse_json

PARQUET = ".parquet"
_WANTED = 'a record is a line of its own: {"messages": [{"role": "user", "content": ...}, ...]}'
_BATCH = 100  # rows of a Parquet file that are looked at together


def _zstandard(path: Path) -> Any:
    import pyarrow

    return pyarrow.input_stream(path, compression="zstd")


COMPRESSED: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _zstandard,
}
SUFFIXES = (".jsonl", ".json", PARQUET, *COMPRESSED)


def read_rows(path: str | Path) -> Iterator[tuple[str, Any]]:
    """The rows of a file and where each stands in it, one at a time ("line 3", "record 3").

    By its name Parquet or compressed; else a JSON list where it begins as one, and JSON lines where not, of which blank
    ones are passed over. Raises InputError naming the file and line.
    """
    path = Path(path)
    check_regular(path)
    if path.suffix == PARQUET:
        return _parquet(path)
    return _json(path)


def _json(path: Path) -> Iterator[tuple[str, Any]]:
    with _opened(path) as file:
        head = file.peek()
    if head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":
        rows = parse_json(_whole(path), str(path))
        yield from ((f"record {number}", row) for number, row in enumerate(rows, 1))
        return
    first = True
    with _opened(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(JSON_BYTES + 1), b""), 1):
            if len(line) > JSON_BYTES:
                raise InputError(f"{path}: line {number}: has over {JSON_BYTES:,} bytes")
            if line.strip():
                yield f"line {number}", _parsed(line, path, number, first)
                first = False


def _parsed(line: bytes, path: Path, number: int, first: bool) -> Any:
    where = f"{path}: line {number}"
    try:
        return parse_json(_decoded(line, path, number), where, lines=False)
    except InputError as error:
        if first and line.lstrip()[:1] == b"{" and _is_json(path):
            raise InputError(f"{path}: one JSON value over several lines; {_WANTED}") from error
        raise InputError(f"{error}; {_WANTED}") from error


def _decoded(line: bytes, path: Path, number: int) -> str:
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (line {number})") from error


def _whole(path: Path) -> str:
    with _opened(path) as file:
        content = file.read(JSON_BYTES + 1)
    if len(content) > JSON_BYTES:
        raise InputError(f"{path}: a JSON list of over {JSON_BYTES:,} bytes; write a record a line instead")
    return _decoded(content, path, 1)


def _is_json(path: Path) -> bool:
    """Whether a file is one JSON value."""
    try:
        parse_json(_whole(path), "")
    except InputError:
        return False
    return True


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    number = 0
    for batch in _batches(path):
        with _readable(path):
            rows = batch.to_pylist()
        for row in rows:
            number += 1
            yield f"record {number}", _without_nulls(row)


def _batches(path: Path) -> Iterator[Any]:
    """The rows of a Parquet file in parts, of the columns that are read. Raises what ``check_unfolds`` does."""
    import pyarrow.parquet

    most, seen = _most(path), 0
    with _readable(path), pyarrow.parquet.ParquetFile(path) as file:
        names = [name for name in file.schema_arrow.names if name in COLUMNS]
        for batch in file.iter_batches(_BATCH, columns=names or None):
            if (seen := seen + sum(map(_unfolded, batch.columns))) > most:
                raise _unfolds(path)
            yield batch


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """What PyArrow says of a file, or of values that Python does not have, as a date of year 10,000, as InputError."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{path}: not a Parquet file that can be read ({first_line(error)})") from error


def _unfolded(column: Any) -> int:
    """The bytes of a column's values, of which many may name one entry of a dictionary."""
    import pyarrow
    import pyarrow.compute as compute

    if isinstance(column, pyarrow.StructArray):
        return sum(map(_unfolded, column.flatten()))
    if isinstance(column, pyarrow.MapArray):
        first, end = column.offsets[0].as_py(), column.offsets[-1].as_py()
        return sum(_unfolded(part.slice(first, end - first)) for part in (column.keys, column.items))
    if isinstance(column, pyarrow.ListArray | pyarrow.LargeListArray | pyarrow.FixedSizeListArray):
        return _unfolded(column.flatten())
    if not isinstance(column, pyarrow.DictionaryArray):
        return column.nbytes
    if pyarrow.types.is_primitive(column.dictionary.type):
        return column.dictionary_decode().nbytes
    return compute.sum(compute.binary_length(column.dictionary).take(column.indices)).as_py() or 0


def _without_nulls(value: Any) -> Any:
    """A value without the keys that are null: in columns of one schema every mapping has the keys of all."""
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value


def check_unfolds(path: Path, suffix: str) -> None:
    """Raise InputError for a compressed file that cannot be unfolded, or to more than is read of one.

    Args:
        suffix: of such files, one of ``COMPRESSED`` or ``PARQUET``, whatever this one is called.
    """
    if suffix == PARQUET:
        for _ in _batches(path):
            pass
        return
    with _opened(path, suffix) as file:
        while file.read(1 << 20):
            pass


@contextmanager
def _opened(path: Path, suffix: str | None = None) -> Iterator[Any]:
    """The bytes of a file, unfolded where it is compressed. Raises InputError where that cannot be, or never ends."""
    unfold = COMPRESSED.get(path.suffix if suffix is None else suffix)
    try:
        with open(path, "rb") if unfold is None else unfold(path) as file:
            reader = file if unfold is None else io.BufferedReader(_Bounded(file, path), 1 << 16)
            yield reader
    except InputError:
        raise
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        said = getattr(error, "strerror", None) or first_line(error)
        raise InputError(f"{path}: {said}" if unfold is None else f"{path}: cannot be unfolded ({said})") from error


def _most(path: Path) -> int:
    return max(UNFOLDED_BYTES, UNFOLDED * path.stat().st_size)


def _unfolds(path: Path) -> InputError:
    return InputError(f"{path}: unfolds to more than {UNFOLDED} times its size, and is not read")


class _Bounded(io.RawIOBase):
    """What a compressed file unfolds to, up to the largest that it may."""

    def __init__(self, file: BinaryIO, path: Path):
        self._file, self._path, self._left = file, path, _most(path)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        block = self._file.read(len(buffer))
        self._left -= len(block)
        if self._left < 0:
            raise _unfolds(self._path)
        buffer[: len(block)] = block
        return len(block)

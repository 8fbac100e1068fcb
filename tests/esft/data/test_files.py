import bz2
import gzip
import json
import lzma
import re

import pyarrow
import pyarrow.parquet
import pytest

import esft
from esft.data import files
from esft.data.files import read_rows
from tests.esft.models import chat

RECORD = {"messages": chat("a", "b")}
WANTED = 'a record is a line of its own: {"messages": [{"role": "user", "content": ...}, ...]}'
PACKERS = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda content: pyarrow.compress(content, codec="zstd", asbytes=True),
}


def read(path) -> list:
    return list(read_rows(path))


@pytest.mark.parametrize("indent", [None, 1])
def test_a_json_list_holds_a_row_in_each_place(tmp_path, indent: int | None):
    path = tmp_path / "d.json"
    path.write_text("\ufeff " + json.dumps([RECORD, 3], indent=indent), encoding="utf-8")
    assert read(path) == [("record 1", RECORD), ("record 2", 3)]


def test_one_record_over_several_lines_is_told_what_is_expected(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps(RECORD, indent=1))
    with pytest.raises(esft.InputError) as raised:
        read(path)
    assert str(raised.value) == f"{path}: one JSON value over several lines; {WANTED}"


def test_a_first_line_that_is_cut_is_not_taken_for_a_value_over_several(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text('{"messages": [\n{"a": 1}\n')
    with pytest.raises(esft.InputError, match=r"d.jsonl: line 1: not JSON \("):
        read(path)


def test_lines_are_read_in_order_without_blank_ones(tmp_path):
    (tmp_path / "d.jsonl").write_text('\n{"a": 1}\n  \n\t\r\n{"a": 2}')
    assert read(tmp_path / "d.jsonl") == read(str(tmp_path / "d.jsonl")) == [("line 2", {"a": 1}), ("line 5", {"a": 2})]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"messages": [', "not JSON"),
        ("[" * 100_000, "JSON that is nested too deeply"),
        ('{"messages": ' + "9" * 5000 + "}", "holds a whole number of thousands of digits"),
        ('{"messages": [], "messages": []}', "has the key 'messages' twice"),
        ('{"messages": [NaN]}', "NaN is no JSON number"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line: str, message: str):
    path = tmp_path / "d.jsonl"
    path.write_text(f"{json.dumps(RECORD)}\n\n{line}\n")
    with pytest.raises(esft.InputError, match=f"d.jsonl: line 3: {message}.*; {re.escape(WANTED)}$"):
        read(path)


def test_missing_and_binary_files_are_refused(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'{"a": 1}\n\xff\xfe\n')
    with pytest.raises(esft.InputError, match=r"d.jsonl: not UTF-8 text \(line 2\)"):
        read(path)
    with pytest.raises(esft.InputError, match="absent.jsonl: No such file"):
        read_rows(tmp_path / "absent.jsonl")  # at once, and not with the first row
    with pytest.raises(esft.InputError, match="Is a directory"):
        read_rows(tmp_path)


def test_separators_inside_a_string_and_a_byte_order_mark_do_no_harm(tmp_path):
    line = json.dumps({"text": "a\u2028b\x85c"}, ensure_ascii=False)
    (tmp_path / "d.jsonl").write_text(f"\ufeff{line}\r\n{line}\n", encoding="utf-8")
    assert [row["text"] for _, row in read(tmp_path / "d.jsonl")] == ["a\u2028b\x85c"] * 2


@pytest.mark.parametrize("suffix", PACKERS)
def test_compressed_lines_are_those_lines(tmp_path, suffix: str):
    path = tmp_path / f"d.jsonl{suffix}"
    path.write_bytes(PACKERS[suffix](json.dumps(RECORD).encode() * 1 + b'\n{"a": 2}\n'))
    assert read(path) == [("line 1", RECORD), ("line 2", {"a": 2})]


@pytest.mark.parametrize("suffix", PACKERS)
def test_a_compressed_list_is_that_list(tmp_path, suffix: str):
    path = tmp_path / f"d.json{suffix}"
    path.write_bytes(PACKERS[suffix](b"\n [" + b'{"a": 1},' * 9000 + b'{"a": 2}]'))
    found = read(path)
    assert len(found) == 9001 and found[-1] == ("record 9001", {"a": 2})


@pytest.mark.parametrize("suffix", PACKERS)
def test_a_compressed_file_that_is_none_or_cut_is_named(tmp_path, suffix: str):
    path = tmp_path / f"d.jsonl{suffix}"
    whole = PACKERS[suffix](b'{"a": 2}\n' * 5000)
    for content in (b'{"a": 2}\n', whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(esft.InputError, match=rf"d\.jsonl{suffix}: (cannot be unfolded \((?!None)|not |line )"):
            read(path)


@pytest.mark.parametrize("suffix", PACKERS)
def test_what_unfolds_without_end_is_not_read(tmp_path, monkeypatch, suffix: str):
    monkeypatch.setattr(files, "UNFOLDED_BYTES", 1 << 16)
    path = tmp_path / f"d.jsonl{suffix}"
    path.write_bytes(PACKERS[suffix](b'{"a": "' + b"x" * (1 << 24) + b'"}'))
    with pytest.raises(esft.InputError, match=r"unfolds to more than 200 times its size, and is not read$"):
        read(path)
    monkeypatch.setattr(files, "UNFOLDED_BYTES", 1 << 25)
    assert len(read(path)) == 1


@pytest.mark.parametrize("suffix", PACKERS)
def test_what_unfolds_to_just_as_much_as_it_may_is_read(tmp_path, monkeypatch, suffix: str):
    monkeypatch.setattr(files, "UNFOLDED", 0)
    path, content = tmp_path / f"d.jsonl{suffix}", b'{"a": "' + b"x" * 100_000 + b'"}\n'
    path.write_bytes(PACKERS[suffix](content))
    monkeypatch.setattr(files, "UNFOLDED_BYTES", len(content))
    assert len(read(path)) == 1
    monkeypatch.setattr(files, "UNFOLDED_BYTES", len(content) - 1)
    with pytest.raises(esft.InputError, match="unfolds to more than"):
        read(path)


def test_a_json_list_may_have_just_as_many_bytes_as_are_read(tmp_path, monkeypatch):
    path = tmp_path / "d.json"
    path.write_text('[{"a": 1}]')
    monkeypatch.setattr(files, "JSON_BYTES", 10)
    assert read(path) == [("record 1", {"a": 1})]
    monkeypatch.setattr(files, "JSON_BYTES", 9)
    with pytest.raises(esft.InputError, match="d.json: a JSON list of over 9 bytes; write a record a line instead$"):
        read(path)


def parquet(path, rows: list[dict], **settings) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, **settings)


def test_rows_of_parquet_have_the_known_columns_without_nulls(tmp_path):
    path = tmp_path / "d.parquet"
    calling = [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [{"name": "f"}]}]
    parquet(path, [RECORD | {"id": 1}, {"messages": calling, "id": 2}] * 150)
    found = read(path)
    assert found[:2] == [("record 1", RECORD), ("record 2", {"messages": calling})]
    assert len(found) == 300 and found[-1][0] == "record 300"


def test_parquet_of_other_columns_keeps_them_for_the_message(tmp_path):
    parquet(tmp_path / "d.parquet", [{"a": 1}])
    assert read(tmp_path / "d.parquet") == [("record 1", {"a": 1})]


def test_parquet_that_is_none_or_unfolds_without_end_is_named(tmp_path, monkeypatch):
    path = tmp_path / "d.parquet"
    path.write_bytes(b"PAR1")
    with pytest.raises(esft.InputError, match=r"d.parquet: not a Parquet file that can be read \("):
        read(path)
    monkeypatch.setattr(files, "UNFOLDED_BYTES", 1 << 16)
    parquet(path, [{"text": "x" * 10_000}] * 5000)
    with pytest.raises(esft.InputError, match="d.parquet: unfolds to more than 200 times its size"):
        read(path)


def test_parquet_may_unfold_to_just_as_much_as_it_may(tmp_path, monkeypatch):
    rows = [{"text": "x" * (i % 7)} for i in range(250)]
    parquet(path := tmp_path / "d.parquet", rows)
    batches = pyarrow.parquet.ParquetFile(path).iter_batches(100, columns=["text"])  # as many as are read together
    monkeypatch.setattr(files, "UNFOLDED", 0)
    monkeypatch.setattr(files, "UNFOLDED_BYTES", size := sum(batch.nbytes for batch in batches))
    assert [row for _, row in read(path)] == rows
    monkeypatch.setattr(files, "UNFOLDED_BYTES", size - 1)
    with pytest.raises(esft.InputError, match="unfolds to more than"):
        read(path)


def test_entries_of_a_dictionary_count_as_often_as_rows_name_them(tmp_path, monkeypatch):
    texts = pyarrow.array(["x" * 100] * 50)
    pyarrow.parquet.write_table(pyarrow.table({"text": texts.dictionary_encode()}), tmp_path / "d.parquet")
    monkeypatch.setattr(files, "UNFOLDED", 0)
    monkeypatch.setattr(files, "UNFOLDED_BYTES", 5000)
    assert read(tmp_path / "d.parquet")[-1] == ("record 50", {"text": "x" * 100})
    monkeypatch.setattr(files, "UNFOLDED_BYTES", 4999)
    with pytest.raises(esft.InputError, match="unfolds to more than"):
        read(tmp_path / "d.parquet")


NAMED = pyarrow.dictionary(pyarrow.int32(), pyarrow.large_string())


@pytest.mark.parametrize(
    "column",
    [
        pyarrow.array([["x" * 100] * 20] * 2, pyarrow.list_(NAMED)),
        pyarrow.array([["x" * 100] * 20] * 2, pyarrow.large_list(NAMED)),
        pyarrow.array([{"a": "x" * 100}, {"a": None}] * 40, pyarrow.struct([("a", NAMED)])),
        pyarrow.array([[("a", "x" * 100)] * 20] * 2, pyarrow.map_(pyarrow.string(), NAMED)),
    ],
    ids=lambda column: str(column.type)[:10],
)
def test_so_do_those_within_lists_and_mappings(column):
    half = column.slice(len(column) // 2)  # the other rows do not count
    assert column.nbytes < 1000 and 4000 <= files._unfolded(column) < 5000 and 2000 <= files._unfolded(half) < 2500


@pytest.mark.parametrize("kind", [pyarrow.timestamp("us"), pyarrow.timestamp("ms"), pyarrow.timestamp("us", "Mars/X")])
def test_values_that_python_does_not_have_are_named(tmp_path, kind):
    values = pyarrow.array([2**62], pyarrow.int64()).cast(kind)
    pyarrow.parquet.write_table(pyarrow.table({"text": values}), tmp_path / "d.parquet")
    with pytest.raises(esft.InputError, match=r"d.parquet: not a Parquet file that can be read \("):
        read(tmp_path / "d.parquet")


def test_a_line_may_have_just_as_many_bytes_as_are_read(tmp_path, monkeypatch):
    path = tmp_path / "d.jsonl"
    path.write_text('{"a": 1}\n{"a": 12}\n')
    monkeypatch.setattr(files, "JSON_BYTES", 10)
    assert read(path) == [("line 1", {"a": 1}), ("line 2", {"a": 12})]
    monkeypatch.setattr(files, "JSON_BYTES", 9)
    with pytest.raises(esft.InputError, match=r"d\.jsonl: line 2: has over 9 bytes$"):
        read(path)

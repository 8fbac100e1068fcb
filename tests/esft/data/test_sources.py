import bz2
import gc
import gzip
import json
import logging
import lzma
import os
import zipfile
from pathlib import Path
from types import SimpleNamespace

import datasets
import pyarrow
import pyarrow.parquet
import pytest

import esft
from esft.data import sources
from esft.data.records import Record
from esft.data.sources import DataSource, read_records
from esft.storage.files import file_digest
from tests.esft.checkpoint.files import rewrite_json
from tests.esft.models import chat, record, write_records


@pytest.mark.parametrize(
    ("text", "path", "split", "weight"),
    [
        ("d.jsonl", "d.jsonl", None, None),
        ("a/b.parquet:0.3", "a/b.parquet", None, 0.3),
        ("a/b@test", "a/b", "test", None),
        ("a/b/c@train[:10%]:2", "a/b/c", "train[:10%]", 2.0),
        ("a/b:.5", "a/b", None, 0.5),
        ("a/b:c", "a/b:c", None, None),
    ],
)
def test_a_source_is_a_path_with_split_and_weight(text: str, path: str, split: str | None, weight: float | None):
    assert DataSource.of(text) == DataSource(path, split, weight)
    assert DataSource.of(str(DataSource.of(text))) == DataSource.of(text)


def test_a_path_is_the_source_that_its_text_is(tmp_path):
    for path in (write_records(tmp_path / "d.jsonl", 1), tmp_path, Path("absent.jsonl")):
        assert DataSource.of(path) == DataSource(str(path))


def test_a_file_of_that_very_name_is_itself(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d:2").write_text("")
    assert DataSource.of("d:2") == DataSource("d:2")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is no path"),
        ("d.jsonl:0", r"d.jsonl:0: a source's weight must be in \[1e-09, 1e\+09\]$"),
        ("d.jsonl:" + "9" * 200, r"9: a source's weight must be in \[1e-09, 1e\+09\]$"),
        ("d.jsonl:0.0000000001", r"1: a source's weight must be in \[1e-09, 1e\+09\]$"),
        ("d.jsonl@test", "d.jsonl@test: a file has no splits"),
    ],
)
def test_what_is_no_source_is_named(text: str, message: str):
    with pytest.raises(esft.InputError, match=message):
        DataSource.of(text)


def test_data_that_is_measured_has_no_weight():
    assert DataSource.measured("d.jsonl") == DataSource("d.jsonl")
    with pytest.raises(esft.InputError, match="^d.jsonl:2: of data that is measured every record counts once"):
        DataSource.measured("d.jsonl:2")


@pytest.mark.parametrize(
    ("path", "is_file"),
    [
        ("absent", True),
        ("absent.jsonl", True),
        ("a/b.jsonl", True),
        ("a/b/c/d", True),
        ("a/b", False),
        ("a/b.c", False),
    ],
)
def test_what_is_not_there_is_a_file_unless_the_hub_may_have_it(path: str, is_file: bool):
    source = DataSource(path)
    assert source.is_file == is_file
    assert (source.local is not None) == is_file
    if is_file:
        with pytest.raises(esft.InputError, match=f"^{path}: No such file"):
            source.check()
    else:
        source.check()


def test_records_come_with_their_places_and_bad_ones_are_named(tmp_path):
    path = write_records(tmp_path / "d.jsonl", 2)
    assert read_records(path) == read_records(str(path)) == [record("say a", "aaa"), record("say b", "bbb")]
    assert [each.place for each in read_records(path)] == ["line 1", "line 2"]
    path.write_text('{"text": "a"}\n\n{"a": 1}')
    with pytest.raises(esft.InputError, match=r"d\.jsonl: line 3: has none of the columns"):
        read_records(path)


def test_a_source_without_records_is_refused(tmp_path):
    (tmp_path / "d.jsonl").write_text("\n\n")
    with pytest.raises(esft.InputError, match="d.jsonl: holds no records$"):
        read_records(tmp_path / "d.jsonl")


def test_the_digest_of_a_file_is_of_its_bytes(tmp_path):
    path = write_records(tmp_path / "d.jsonl", 2)
    assert DataSource.of(path).digest() == file_digest(path)


@pytest.fixture
def folder(tmp_path):
    """A folder that ``datasets`` reads, with two splits."""
    datasets.disable_progress_bars()
    (tmp_path / "set").mkdir()
    for split, count in (("train", 3), ("test", 2)):
        write_records(tmp_path / "set" / f"{split}.jsonl", count)
    return tmp_path / "set"


def test_a_folder_is_read_by_split(folder):
    expected = [record(f"say {c}", c * 3) for c in "abc"]
    assert read_records(folder) == expected and read_records(folder)[2].place == "record 3"
    assert read_records(f"{folder}@test") == expected[:2]
    assert list(DataSource.of(folder).records(streaming=True)) == expected
    assert DataSource.of(folder).local == folder
    with pytest.raises(esft.InputError, match=rf"^{folder}@best: cannot be read \("):
        read_records(f"{folder}@best")


def test_a_folder_is_no_configuration_of_the_hubs_though_its_path_could_be_one(folder, monkeypatch):
    (folder.parent / "owner" / "name").mkdir(parents=True)
    folder.rename(folder.parent / "owner" / "name" / "set")
    monkeypatch.chdir(folder.parent)
    assert len(read_records("owner/name/set")) == 3


@pytest.mark.parametrize("module", ["somebody.else.json.json", "datasets.packaged_modules.pandas.pandas"])
def test_what_is_no_reader_of_plain_rows_is_not_run(folder, monkeypatch, module: str):
    builder = type("Builder", (SimpleNamespace,), {"__module__": module})
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_: builder())
    monkeypatch.setattr(datasets, "load_dataset", None)
    with pytest.raises(esft.InputError, match=f"set: holds files of the kind {module.rpartition('.')[2]}; json, "):
        read_records(folder)


def test_the_order_of_a_rows_columns_is_not_in_its_digest(monkeypatch):
    rows: list[list[dict]] = [[{"a": 1, "b": {"c": 2, "d": 3}}], [{"b": {"d": 3, "c": 2}, "a": 1}], [{"a": 1}]]
    found = []
    for each in rows:
        monkeypatch.setattr(DataSource, "rows", lambda self, each=each: ((str(i), row) for i, row in enumerate(each)))
        found.append(DataSource("owner/name").digest())
    assert found[0] == found[1] != found[2]


def test_the_digest_of_a_folder_is_of_the_splits_rows(folder):
    before = DataSource.of(folder).digest(), DataSource.of(f"{folder}@test").digest()
    (folder / "test.jsonl").write_text(json.dumps({"messages": chat("x", "y")}))
    after = DataSource.of(folder).digest(), DataSource.of(f"{folder}@test").digest()
    assert after[0] == before[0] and after[1] != before[1]


def test_a_data_set_that_was_saved_is_loaded(tmp_path):
    saved = datasets.Dataset.from_list([{"messages": chat("a", "b")}])
    saved.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": saved, "test": saved}).save_to_disk(tmp_path / "two")
    for text in (tmp_path / "one", tmp_path / "two", f"{tmp_path / 'two'}@test"):
        assert read_records(text) == [Record(chat("a", "b"))]


def test_a_folder_of_other_kinds_of_files_is_not_read(folder):
    for path in folder.iterdir():
        path.unlink()
    (folder / "train.tar").write_bytes(b"")
    with pytest.raises(esft.InputError, match="set: holds files of the kind webdataset; json, parquet, arrow, csv are"):
        read_records(folder)


def test_what_the_hub_does_not_have_is_named():
    with pytest.raises(esft.InputError, match=r"^no/such: no such file or folder, and no data set of"):
        read_records("no/such")


def test_a_stream_is_opened_as_one_and_what_is_not_is_read_whole(folder, monkeypatch):
    asked, real = [], datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: asked.append(k) or real(*a, **k))
    for streaming in (True, False):
        assert len(list(DataSource.of(f"{folder}@test").records(streaming))) == 2
    assert asked == [{"split": "test", "streaming": True}, {"split": "test", "streaming": False}]


def test_the_digest_of_a_stream_is_of_its_split_and_of_what_its_files_are(folder):
    def digests() -> list[str]:
        return [DataSource.of(text).digest(streaming=True) for text in (folder, f"{folder}@test")]

    before = digests()
    assert before == digests() and before[0] != before[1]
    os.utime(folder / "train.jsonl", (1, 1))
    assert all(one != other for one, other in zip(before, digests(), strict=True))


def card(files: str) -> str:
    configs = f"- config_name: default\n  data_files:\n  - split: train\n    path: {files}"
    return f"---\nlicense: mit\nconfigs:\n{configs}\n---\n"


@pytest.mark.parametrize(
    "files", ["/etc/passwd", "../g.jsonl", "a/../../g.jsonl", "~/g.jsonl", "http://localhost:9/g.jsonl", '"zip://*::a"']
)
@pytest.mark.parametrize("name", ["README.md", ".huggingface.yaml"])
def test_a_folders_card_sends_nobody_elsewhere(folder, monkeypatch, files: str, name: str):
    monkeypatch.setattr(datasets, "load_dataset_builder", None)  # it would go there
    text = card(files)
    (folder / name).write_text(text if name.endswith(".md") else text.strip("-\n"))
    with pytest.raises(esft.InputError, match=f"set/{name}: names .*, which is not in this folder$"):
        read_records(folder)


def test_a_folders_card_says_which_of_its_files_are_read(folder):
    (folder / "README.md").write_text(card("test.jsonl") + "\nSee https://example.com, ../ and ~.")
    assert len(read_records(folder)) == 2
    others = "  description: see https://example.com\nfeatures: &a [text]\nmore: *a"
    (folder / "README.md").write_text(card("test.jsonl").replace("\n---\n", f"\n{others}\n---\n"))
    assert len(read_records(folder)) == 2
    (folder / "README.md").write_text("No card, but ---\nconfigs: /etc\n---\n")
    assert len(read_records(folder)) == 3


def test_a_file_that_is_found_elsewhere_is_not_read(folder, monkeypatch):
    real, found = datasets.load_dataset_builder, str(write_records(folder.parent / "g.jsonl", 1))

    def builder(*named):
        made = real(*named)
        made.config.data_files = {"train": [found]}
        return made

    monkeypatch.setattr(datasets, "load_dataset_builder", builder)
    with pytest.raises(esft.InputError, match=r"set: names '.*g.jsonl', which is not in this folder$"):
        read_records(folder)
    monkeypatch.setattr(DataSource, "local", None)
    with pytest.raises(esft.InputError, match=r"set: names '.*g.jsonl', which is not of the hub$"):
        read_records(folder)


@pytest.mark.parametrize("packed", [gzip, bz2, lzma])
def test_compressed_files_of_a_folder_are_read_to_a_multiple_of_their_size(folder, monkeypatch, packed):
    text = (folder / "train.jsonl").read_bytes()
    (folder / "train.jsonl").write_bytes(packed.compress(text))  # whatever it is called, it would be unfolded
    assert len(read_records(folder)) == 3
    os.utime(folder / "train.jsonl", (1, 1))  # another file, as far as anybody knows
    monkeypatch.setattr("esft.data.files.UNFOLDED_BYTES", 100)
    monkeypatch.setattr("esft.data.files.UNFOLDED", 1)
    with pytest.raises(esft.InputError, match=r"train\.jsonl: unfolds to more than 1 times its size"):
        read_records(folder)


def test_a_parquet_file_of_a_folder_is_read_to_a_multiple_of_its_size_too(folder, monkeypatch):
    monkeypatch.setattr("esft.data.files.UNFOLDED_BYTES", 5000)
    monkeypatch.setattr("esft.data.files.UNFOLDED", 1)
    for path in folder.glob("*.jsonl"):
        path.unlink()
    for count, refused in ((40, False), (60, True)):  # of 100 bytes each, all of them one entry of a dictionary
        texts = pyarrow.array(["a" * 100] * count).dictionary_encode()
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), folder / "train.parquet")
        if not refused:
            assert len(read_records(folder)) == count
        else:
            with pytest.raises(esft.InputError, match=r"train\.parquet: unfolds to more than 1 times its size"):
                read_records(folder)


def test_compressed_files_of_a_folder_are_measured_once_and_not_where_they_are_streamed(folder, monkeypatch):
    asked = []
    monkeypatch.setattr(sources, "check_unfolds", lambda path, suffix: asked.append((path.name, suffix)))
    packed = folder / "train.jsonl.gz"
    packed.write_bytes(gzip.compress((folder / "train.jsonl").read_bytes()))
    (folder / "train.jsonl").unlink()
    source = DataSource.of(folder)
    assert len(list(source.records(streaming=True))) == 3 and source.digest(streaming=True) and asked == []
    for _ in range(2):
        assert len(list(source.records())) == 3 and source.digest() and asked == [(packed.name, ".gz")]


def test_readers_that_end_in_any_order_leave_what_datasets_says_as_it_was(folder):
    before = datasets.logging.get_verbosity()
    first, second = DataSource.of(folder).records(), DataSource.of(folder).records()
    assert next(first).text == next(second).text
    first.close()
    assert datasets.logging.get_verbosity() == logging.CRITICAL  # the other one still reads
    list(second)
    del first, second
    gc.collect()
    assert datasets.logging.get_verbosity() == before


def test_an_archive_in_a_folder_is_not_unpacked(folder):
    with zipfile.ZipFile(folder / "more.zip", "w") as archive:
        archive.write(folder / "test.jsonl", "train.jsonl")
    (folder / "README.md").write_text(card("more.zip"))
    with pytest.raises(esft.InputError, match=r"more\.zip: is an archive \(zip\), and is not read; unpack it$"):
        read_records(folder)


def pictures(folder: Path, column: str) -> Path:
    """A saved data set with a column of pictures, of which it only has an address."""
    picture = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    pictures_of_it = pyarrow.array([{"bytes": None, "path": "http://localhost:9/x.png"}], picture)
    datasets.Dataset(pyarrow.table({"text": ["hi"]} | {column: pictures_of_it})).save_to_disk(folder)
    rewrite_json(folder / "dataset_info.json", lambda info: info["features"].update({column: {"_type": "Image"}}))
    return folder


def test_what_would_be_decoded_is_passed_over_and_refused_where_a_record_is_made_of_it(tmp_path):
    assert read_records(pictures(tmp_path / "beside", "photo")) == [Record(text="hi")]
    with pytest.raises(esft.InputError, match="taken: column text is of the kind Image; text is read$"):
        read_records(pictures(tmp_path / "taken", "text"))


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("one/state.json", "_data_files", [{"filename": "../two/train/data-00000-of-00001.arrow"}]),
        ("one/state.json", "_data_files", [{"filename": "/etc/passwd"}]),
        ("one/state.json", "_data_files", [{"filename": None}]),
        ("one/state.json", "_data_files", "x"),
        ("one/state.json", "_indices_data_files", [{"filename": "../x.arrow"}]),
        ("two/dataset_dict.json", "splits", ["../one"]),
        ("two/dataset_dict.json", "splits", [5]),
        ("two/dataset_dict.json", "splits", {"train": 1}),
    ],
)
def test_a_saved_data_set_has_its_files_beside_what_names_them(tmp_path, file: str, key: str, value):
    saved = datasets.Dataset.from_list([{"messages": chat("a", "b")}])
    saved.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": saved}).save_to_disk(tmp_path / "two")
    rewrite_json(tmp_path / file, lambda values: values.update({key: value}))
    with pytest.raises(esft.InputError, match=rf"{file}: (has no list {key}|{key} has .*, which is no name of)"):
        read_records(tmp_path / Path(file).parts[0])

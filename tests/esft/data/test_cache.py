import hashlib
import json
import os
from functools import partial

import numpy as np
import pytest
from huggingface_hub import cached_assets_path
from safetensors import safe_open
from safetensors.numpy import save_file

import esft
from esft.data import cache
from esft.data.cache import encoded, folder, load, save
from esft.data.examples import Example, Examples
from esft.data.sources import DataSource
from tests.esft.models import chat, tiny_encoder, write_records

SOME = Examples.of([Example([5, 6], [-100, 6]), Example([7], [7])], records=3, truncated=1)


@pytest.fixture(autouse=True)
def kept(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "cached_assets_path", lambda *a, **k: _made(tmp_path / "assets"))
    return tmp_path / "assets"


def _made(path):
    path.mkdir(exist_ok=True)
    return path


@pytest.fixture
def counted(monkeypatch):
    """How often something was encoded."""
    calls, real = [], cache.encode_all
    monkeypatch.setattr(cache, "encode_all", lambda *args: calls.append(args) or real(*args))
    return calls


def test_the_second_time_nothing_is_encoded(tmp_path, counted):
    source = DataSource.of(write_records(tmp_path / "d.jsonl", 5))
    first, second = (encoded(source, tiny_encoder()) for _ in range(2))
    assert len(counted) == 1
    assert list(first) == list(second) and (second.records, second.truncated) == (5, 0)


def test_other_content_settings_or_tokenizers_are_encoded_anew(tmp_path, counted):
    path = write_records(tmp_path / "d.jsonl", 5)
    source, other = DataSource.of(path), tiny_encoder()
    other.tokenizer.chat_template = " " + str(other.tokenizer.chat_template)
    for encoder in (tiny_encoder(), tiny_encoder(98), other):
        encoded(source, encoder)
    write_records(path, 4)
    encoded(source, tiny_encoder())
    assert len(counted) == 4


def test_what_is_said_of_the_data_is_said_again(tmp_path, caplog):
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps({"messages": chat("a", c * 30)}) + "\n" for c in "xy"))
    for _ in range(2):
        encoded(DataSource.of(path), tiny_encoder(20))
    assert len({each.getMessage() for each in caplog.records}) == 1 and len(caplog.records) == 2
    for _ in range(2):
        with pytest.raises(esft.InputError, match="no record has its answer within 3 tokens"):
            encoded(DataSource.of(path), tiny_encoder(3))


def test_what_was_saved_is_loaded(kept):
    save(folder() / "a.safetensors", SOME)
    found = load(kept / "a.safetensors")
    assert found is not None and list(found) == list(SOME) and (found.records, found.truncated) == (3, 1)
    assert load(kept / "absent.safetensors") is None


def test_a_damaged_file_is_none(kept):
    save(path := folder() / "a.safetensors", SOME)
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        found = load(path)
        assert found is None or (list(found), found.records, found.truncated) == (list(SOME), 3, 1)
    for content in (b"", whole[:-1], whole + b"x"):
        path.write_bytes(content)
        assert load(path) is None


def test_arrays_of_other_types_are_none(kept):
    wrong = Examples(SOME.ids.astype(np.int64), SOME.counted, SOME.ends, 3, 1)
    with pytest.raises(ValueError):
        save(folder() / "a.safetensors", wrong)


def test_files_that_were_not_used_for_the_longest_time_go(kept, monkeypatch):
    monkeypatch.setattr(cache, "KEPT", 2)
    for age, name in ((30, "a"), (20, "b")):
        save(path := folder() / f"{name}.safetensors", SOME)
        os.utime(path, (path.stat().st_mtime - age,) * 2)
    assert load(kept / "a.safetensors") is not None  # so it was used
    save(kept / "c.safetensors", SOME)
    assert sorted(path.stem for path in kept.iterdir()) == ["a", "c"]


def test_a_cache_that_cannot_be_written_costs_time_only(tmp_path, kept, monkeypatch, counted):
    source = DataSource.of(write_records(tmp_path / "d.jsonl", 5))
    kept.write_text("")  # a file in the folder's place
    monkeypatch.setattr(cache, "cached_assets_path", lambda *a, **k: kept)
    assert [len(encoded(source, tiny_encoder())) for _ in range(2)] == [5, 5]
    monkeypatch.setattr(cache, "cached_assets_path", lambda *a, **k: kept.mkdir())
    assert len(encoded(source, tiny_encoder())) == 5
    assert len(counted) == 3


def test_a_file_that_says_nothing_of_itself_is_none(kept):
    path = folder() / "a.safetensors"
    save_file({"ids": SOME.ids, "counted": SOME.counted, "ends": SOME.ends}, path)
    assert load(path) is None


def test_the_same_bytes_in_other_arrays_are_none(kept):
    """Not only the bytes of all arrays are compared, but where each of them ends."""
    ids, counted = np.array([1, 0x01010101], np.int32), np.array([True, False])
    whole = Examples(ids, counted, np.array([2]), 1, 0)
    save(path := folder() / "a.safetensors", whole)
    with safe_open(path, framework="np") as handle:
        about = handle.metadata()
    other = {"ids": ids[:1], "counted": np.array([True] * 5 + [False]), "ends": np.array([2])}
    save_file(other, path, about)
    assert load(path) is None


def test_a_file_that_was_used_is_as_new(kept):
    save(path := folder() / "a.safetensors", SOME)
    os.utime(path, (1, 1))
    assert load(path) is not None and path.stat().st_mtime > 1e9


def test_examples_are_of_the_first_version_of_the_format(tmp_path):
    """What decides on a file's name: a change of what is in there is another version."""
    source, encoder = DataSource.of(write_records(tmp_path / "d.jsonl", 2)), tiny_encoder()
    encoded(source, encoder)
    name = hashlib.sha256(json.dumps([1, source.digest(), encoder.digest()]).encode()).hexdigest()
    assert [path.stem for path in folder().iterdir()] == [name]


def test_a_file_in_the_place_of_the_caches_folder_only_costs_time(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(cache, "cached_assets_path", partial(cached_assets_path, assets_dir=tmp_path / "file"))
    assert cache.folder() is None

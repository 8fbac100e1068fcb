import os

import pytest

import esft
from esft.files import check_apart, check_new_file, new_folder, read_json, write_json


def test_a_new_folder_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(RuntimeError, match="half way"), new_folder(tmp_path / "out") as folder:
        (folder / "first").write_text("1")
        raise RuntimeError("half way")
    assert not list(tmp_path.iterdir())
    with new_folder(tmp_path / "deep" / "out") as folder:
        (folder / "first").write_text("1")
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["out"]


def test_an_old_folder_stays_when_its_successor_fails(tmp_path):
    with new_folder(tmp_path / "out") as folder:
        (folder / "old").write_text("1")
    with pytest.raises(RuntimeError), new_folder(tmp_path / "out", overwrite=True):
        raise RuntimeError
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["old"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_places_that_cannot_be_written_are_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "x"):
        with pytest.raises(esft.InputError, match="file"), new_folder(path, overwrite=True):
            pass
    with pytest.raises(esft.InputError, match="is not a folder"):
        check_new_file(tmp_path / "file" / "x.json")
    with pytest.raises(esft.InputError, match="is a folder"):
        check_new_file(tmp_path, overwrite=True)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(esft.InputError, match="cannot be written to"):
        check_new_file(tmp_path / "x.json")


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    write_json(tmp_path / "x.json", 1)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(esft.InputError, match="x.json: No space left"):
        write_json(tmp_path / "x.json", 2)
    assert read_json(tmp_path / "x.json") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_an_output_above_an_input_is_refused_and_one_beside_it_is_not(tmp_path):
    source = tmp_path / "a" / "base"
    for out in (source, tmp_path / "a", tmp_path, source / ".." / "base"):
        with pytest.raises(esft.InputError, match="would replace"):
            check_apart(out, source)
    check_apart(tmp_path / "b", source)
    check_apart(source / "run", source)


def test_a_link_to_a_folder_stays_and_what_it_leads_to_is_replaced(tmp_path):
    (tmp_path / "real").mkdir()
    for link, target in (("link", "real"), ("dangling", "new")):
        (tmp_path / link).symlink_to(tmp_path / target)
        for content in "12":
            with new_folder(tmp_path / link, overwrite=True) as folder:
                (folder / "file").write_text(content)
        assert (tmp_path / link).is_symlink() and (tmp_path / target / "file").read_text() == "2"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dangling", "link", "new", "real"]


def test_the_working_folder_is_not_replaced(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    for path in (".", "..", tmp_path, tmp_path / "work"):
        with pytest.raises(esft.InputError, match="the working folder cannot be replaced"), new_folder(path, True):
            pass
    assert [p.name for p in tmp_path.iterdir()] == ["work"]


def test_a_key_that_a_file_has_twice_is_named(tmp_path):
    (tmp_path / "x.json").write_text('{"experts": {"1": [0], "2": [3], "1": [5]}}')
    with pytest.raises(esft.InputError, match="x.json: has the key '1' twice"):
        read_json(tmp_path / "x.json")

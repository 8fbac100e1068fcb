import builtins
import errno
import json
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import esft
from esft.storage import files
from esft.storage.files import (
    TEMPORARY,
    open_safetensors,
    safetensors_header,
    whole_file,
    write_json,
    write_text,
    write_yaml,
)
from tests.esft.processes import forked, status


def test_an_error_of_the_system_without_a_text_of_its_own_is_said_in_full(tmp_path, monkeypatch):
    def fails(*_, **__):
        raise OSError("of no number")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(esft.DiskError, match=r"/x: of no number$"):
        write_json(tmp_path / "x", 1)


def test_json_is_written_for_people_too(tmp_path):
    write_json(tmp_path / "x.json", {"a": [1, 2.5]})
    text = (tmp_path / "x.json").read_text()
    assert text.startswith('{\n "a": [\n  1,') and text.endswith("}\n")


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    write_json(tmp_path / "x.json", 1)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(esft.DiskError, match=r"/x\.json: No space left on device$"):
        write_json(tmp_path / "x.json", 2)
    assert json.loads((tmp_path / "x.json").read_text()) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_a_block_that_does_not_end_leaves_the_old_file_and_no_other(tmp_path, error: type[BaseException]):
    write_text(tmp_path / "x", "old")
    with pytest.raises(error), whole_file(tmp_path / "x") as file:
        file.write(b"half")
        raise error
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"x": "old"}


def test_a_header_says_where_the_bytes_of_each_tensor_are(tmp_path):
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.arange(4, dtype=torch.int16), "c": torch.tensor(1.5)}
    for metadata in (None, {"format": "pt"}):
        save_file(tensors, tmp_path / "x.safetensors", metadata)
        header, content = safetensors_header(tmp_path / "x.safetensors"), (tmp_path / "x.safetensors").read_bytes()
        assert header.keys() == tensors.keys()
        for name, stored in header.items():
            assert stored.shape == tuple(tensors[name].shape)
            assert content[stored.start : stored.end] == tensors[name].numpy().tobytes()
        assert [header[name].dtype for name in "abc"] == ["F32", "I16", "F32"]
        assert max(stored.end for stored in header.values()) == len(content)


def test_what_is_no_safetensors_file_is_named(tmp_path):
    save_file({"a": torch.ones(3)}, tmp_path / "x")
    with open_safetensors(tmp_path / "x") as handle:
        assert torch.equal(handle.get_tensor("a"), torch.ones(3))
    (tmp_path / "x").write_bytes((tmp_path / "x").read_bytes()[:-1])
    for name, said in (("x", r"not a readable safetensors file \(."), ("absent", "No such file")):
        for read in (safetensors_header, lambda path: open_safetensors(path).__enter__()):
            with pytest.raises(esft.InputError, match=rf"^{tmp_path / name}: {said}"):
                read(tmp_path / name)


def test_a_file_is_the_old_one_or_the_new_one_and_nothing_else_beside_it_is_touched(tmp_path, monkeypatch):
    for name in (".x.tmp", ".x.old", "x.tmp"):
        (tmp_path / name).write_text("mine")
    write_text(tmp_path / "x", "old")
    seen, replace = [], os.replace

    def watched(source, target):
        seen.append(((tmp_path / "x").read_text(), Path(source).read_text(), TEMPORARY.fullmatch(Path(source).name)))
        replace(source, target)

    monkeypatch.setattr(os, "replace", watched)
    write_text(tmp_path / "x", "new")
    ((before, after, known),) = seen
    assert (before, after, (tmp_path / "x").read_text()) == ("old", "new", "new") and known
    assert sorted(path.name for path in tmp_path.iterdir()) == [".x.old", ".x.tmp", "x", "x.tmp"]
    assert {(tmp_path / name).read_text() for name in (".x.tmp", ".x.old", "x.tmp")} == {"mine"}


def test_the_file_that_a_link_leads_to_is_replaced_and_a_loop_is_named(tmp_path):
    (tmp_path / "file").write_text("old")
    (tmp_path / "link").symlink_to("file")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "new"
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(esft.DiskError, match="^[^\n]*/a: [^\n]*$"):
        write_text(tmp_path / "a", "new")


@pytest.mark.parametrize("value", [float("nan"), [float("inf")], {"a": -float("inf")}])
def test_numbers_that_json_does_not_have_are_refused(tmp_path, value):
    with pytest.raises(esft.InputError, match=r"/x\.json: cannot hold a value that is not finite$"):
        write_json(tmp_path / "x.json", value)
    assert not list(tmp_path.iterdir())


def test_a_disk_without_room_for_the_first_byte_is_named_too(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(builtins, "open", full)
    with pytest.raises(esft.DiskError, match=r"/x: No space left on device$"):
        write_text(tmp_path / "x", "new")


def test_settings_are_written_in_their_order(tmp_path):
    write_yaml(tmp_path / "x.yaml", {"steps": 3, "lr": 0.5, "name": None})
    assert (tmp_path / "x.yaml").read_text() == "steps: 3\nlr: 0.5\nname: null\n"


def written_by_one_that_is_killed(path: Path) -> None:
    """Leave what a writer of this file leaves that is killed in the middle."""

    def child() -> None:
        with whole_file(path) as file:
            file.write(b"half")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    assert status(forked(child)) == -signal.SIGKILL


def test_what_a_killed_writer_has_left_is_cleared_away_by_the_next_of_the_same_file(tmp_path):
    written_by_one_that_is_killed(tmp_path / "x")
    written_by_one_that_is_killed(tmp_path / "y")
    mine = {".esft-0123abcd.tmp", ".esft-x.tmp", "x.tmp"}
    for name in mine:
        (tmp_path / name).write_text("mine")
    assert len([p for p in tmp_path.iterdir() if TEMPORARY.fullmatch(p.name)]) == 3
    write_text(tmp_path / "x", "new")
    left = {p.name: p.read_text() for p in tmp_path.iterdir()}
    assert left.pop("x") == "new" and all(left.pop(name) == "mine" for name in mine)
    assert list(left.values()) == ["half"]  # of the other file
    write_text(tmp_path / "y", "new")
    assert {p.name for p in tmp_path.iterdir()} == {"x", "y", *mine}


def test_what_a_living_writer_has_begun_is_left_to_it(tmp_path):
    with whole_file(tmp_path / "x") as file:
        file.write(b"first")
        write_text(tmp_path / "x", "second")
        assert (tmp_path / "x").read_text() == "second"
    assert (tmp_path / "x").read_text() == "first"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_a_link_under_a_temporary_name_is_no_file_of_ours(tmp_path):
    written_by_one_that_is_killed(tmp_path / "x")
    (left,) = tmp_path.iterdir()
    left.rename(tmp_path / "mine")
    left.symlink_to(tmp_path / "mine")
    write_text(tmp_path / "x", "new")
    assert (tmp_path / "mine").read_text() == "half" and left.is_symlink()


def test_a_writer_whose_file_is_taken_for_a_dead_ones_before_it_holds_it_begins_another(tmp_path, monkeypatch):
    """Another writer's clearing may come between the making of the file and the holding of it."""
    held, real = [], files._hold

    def late(file):
        if not held:
            Path(file.name).unlink()
        held.append(file.name)
        return real(file)

    monkeypatch.setattr(files, "_hold", late)
    write_text(tmp_path / "x", "new")
    assert (tmp_path / "x").read_text() == "new" and len(set(held)) == 2


def test_where_nothing_can_be_held_files_are_written_and_nothing_is_cleared_away(tmp_path, monkeypatch):
    written_by_one_that_is_killed(tmp_path / "x")
    monkeypatch.setattr(files, "fcntl", None)
    write_text(tmp_path / "x", "new")
    assert sorted(p.read_text() for p in tmp_path.iterdir()) == ["half", "new"]


def test_on_a_disk_without_locks_nothing_is_taken_for_a_dead_writers(tmp_path, monkeypatch):
    written_by_one_that_is_killed(tmp_path / "x")

    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", none)
    write_text(tmp_path / "x", "new")
    assert sorted(p.read_text() for p in tmp_path.iterdir()) == ["half", "new"]


def test_the_bytes_are_on_the_disk_before_the_name_is(tmp_path, monkeypatch):
    done, replace, sync = [], os.replace, os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: done.append("sync") or sync(number))
    monkeypatch.setattr(os, "replace", lambda *paths: done.append("replace") or replace(*paths))
    write_text(tmp_path / "x", "new")
    assert done == ["sync", "replace"]


def test_a_name_as_long_as_names_can_be_is_written(tmp_path):
    write_text(tmp_path / ("x" * 255), "new")
    assert [p.name for p in tmp_path.iterdir()] == ["x" * 255]


@pytest.mark.parametrize("link", [False, True])
def test_what_is_no_regular_file_is_never_replaced(tmp_path, link: bool):
    os.mkfifo(tmp_path / "pipe")
    path = tmp_path / "link" if link else tmp_path / "pipe"
    if link:
        path.symlink_to("pipe")
    with pytest.raises(esft.DiskError, match=rf"/{path.name}: is no regular file, and is not replaced$"):
        write_text(path, "x")
    assert (tmp_path / "pipe").is_fifo() and len(list(tmp_path.iterdir())) == 1 + link

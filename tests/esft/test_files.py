import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

import esft
from esft.files import (
    check_apart,
    check_earlier,
    check_new_file,
    check_new_folder,
    new_folder,
    open_safetensors,
    safetensors_header,
    write_json,
)


def test_a_new_folder_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(RuntimeError, match="half way"), new_folder(tmp_path / "out") as folder:
        (folder / "first").write_text("1")
        raise RuntimeError("half way")
    assert not list(tmp_path.iterdir())
    out = tmp_path / "deep" / "er" / "out"
    with new_folder(str(out)) as folder:
        (folder / "first").write_text("1")
        assert not out.exists()
    assert [p.name for p in out.parent.iterdir()] == ["out"]
    assert (out / "first").read_text() == "1"


def test_an_old_folder_stays_when_its_successor_fails(tmp_path):
    with new_folder(tmp_path / "out") as folder:
        (folder / "old").write_text("1")
    with pytest.raises(RuntimeError), new_folder(tmp_path / "out", overwrite=True):
        raise RuntimeError
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["old"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_old_folder_is_replaced_as_a_whole_when_said_so_and_whatever_a_crash_left(tmp_path):
    out = tmp_path / "out"
    with new_folder(out) as folder:
        (folder / "old").write_text("1")
    for left in (".out.tmp", ".out.old"):
        (tmp_path / left).mkdir()
        (tmp_path / left / "half").write_text("")
    with pytest.raises(esft.InputError, match="holds something already"), new_folder(out):
        pass
    with new_folder(out, overwrite=True) as folder:
        assert folder.parent == tmp_path  # on the same disk, so that a rename does it
        assert not list(folder.iterdir())
        assert (out / "old").exists()
        (folder / "new").write_text("1")
    assert [p.name for p in out.iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_empty_folder_is_written_to_without_being_told_to_overwrite(tmp_path):
    (tmp_path / "out").mkdir()
    with new_folder(tmp_path / "out") as folder:
        (folder / "new").write_text("1")
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "new"]


@pytest.mark.parametrize("there", [False, True])
def test_a_folder_that_cannot_be_set_in_place_leaves_what_was_there(tmp_path, monkeypatch, there: bool):
    out = tmp_path / "out"
    if there:
        out.mkdir()
        (out / "old").write_text("1")
    replace = os.replace

    def fails(source, target):
        if str(source).endswith(".tmp"):
            raise OSError(errno.EIO, "Input/output error", str(source))
        replace(source, target)

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(esft.DiskError, match=r"Input/output error$"), new_folder(out, overwrite=True):
        pass
    assert [str(p.relative_to(tmp_path)) for p in sorted(tmp_path.rglob("*"))] == ["out", "out/old"][: 2 * there]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/base/source"), "{out}: No space left on device"),
        (OSError(errno.EDQUOT, "Quota exceeded", "/base/source"), "{out}: Quota exceeded"),
        (OSError(errno.EFBIG, "File too large", "/base/source"), "{out}: File too large"),
        (OSError(errno.EIO, "Input/output error", "/base/source"), "/base/source: Input/output error"),
        (OSError(errno.EIO, "Input/output error"), "{out}: Input/output error"),
        (OSError("of no number"), "{out}: of no number"),
        (SafetensorError("I/O error"), "{out}: I/O error"),
        (esft.InputError("{tmp}/x.json: no, {tmp}"), "{out}/x.json: no, {out}"),
        (esft.InputError("elsewhere.json: no"), "elsewhere.json: no"),
    ],
)
def test_an_error_in_the_block_names_the_file_at_fault_as_it_will_be_called(tmp_path, error, message: str):
    out, tmp = tmp_path / "out", tmp_path / ".out.tmp"
    kind = esft.DiskError
    if isinstance(error, esft.InputError):
        kind = esft.InputError
        error = esft.InputError(str(error).format(tmp=tmp))
    with pytest.raises(kind) as raised, new_folder(out):
        raise error
    assert str(raised.value) == message.format(out=out)
    assert not list(tmp_path.iterdir())


def test_other_errors_pass_through(tmp_path):
    with pytest.raises(KeyError, match="mine"), new_folder(tmp_path / "out"):
        raise KeyError("mine")


def test_places_that_cannot_be_written_are_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(esft.InputError, match=r"/file: is a file, not a folder$"),
        new_folder(tmp_path / "file", overwrite=True),
    ):
        pass
    with (
        pytest.raises(esft.InputError, match=r"/file/x: \S+/file is not a folder$"),
        new_folder(tmp_path / "file" / "x"),
    ):
        pass
    with pytest.raises(esft.InputError, match=r"/file/y/x\.json: \S+/file/y is not a folder$"):
        check_new_file(tmp_path / "file" / "y" / "x.json")
    with pytest.raises(esft.InputError, match=r": is a folder$"):
        check_new_file(tmp_path, overwrite=True)
    asked = []
    monkeypatch.setattr(os, "access", lambda path, mode: asked.append((path, mode)))
    for check, path in ((check_new_file, tmp_path / "x.json"), (check_new_folder, tmp_path / "deep" / "x")):
        with pytest.raises(esft.InputError, match=rf"^{path}: {tmp_path} cannot be written to$"):
            check(str(path))
    assert asked == [(tmp_path, os.W_OK)] * 2


def test_a_new_file_may_be_in_any_folder_but_on_another_unless_said_so(tmp_path):
    (tmp_path / "x.json").write_text("1")
    check_new_file(tmp_path / "y.json")
    check_new_file(str(tmp_path / "x.json"), overwrite=True)
    with pytest.raises(esft.InputError, match=r"/x\.json: exists already \(say overwrite"):
        check_new_file(tmp_path / "x.json")
    with pytest.raises(esft.InputError, match=r": is a folder$"):
        check_new_file(tmp_path)


def test_a_new_folder_may_be_anywhere_but_on_another_that_holds_something_unless_said_so(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / ".hidden").write_text("")
    for path in ("empty", "deep/er"):
        check_new_folder(str(tmp_path / path))
    check_new_folder(tmp_path / "full", overwrite=True)
    with pytest.raises(esft.InputError, match=r"/full: holds something already \(say overwrite"):
        check_new_folder(tmp_path / "full")
    with pytest.raises(esft.InputError, match=r"/\.hidden: is a file, not a folder"):
        check_new_folder(tmp_path / "full" / ".hidden", overwrite=True)


def test_an_earlier_one_is_known_by_any_of_its_files(tmp_path):
    (tmp_path / "folder").mkdir()
    check_earlier(tmp_path / "absent", "run", "a", "b")
    check_earlier(tmp_path / "folder", "run", "a", "b")
    (tmp_path / "folder" / "a").mkdir()
    with pytest.raises(esft.InputError, match=r"/folder: holds no earlier run \(no a\), and is not overwritten$"):
        check_earlier(str(tmp_path / "folder"), "run", "a", "b")
    (tmp_path / "folder" / "b").write_text("")
    check_earlier(str(tmp_path / "folder"), "run", "a", "b")


def test_an_error_of_the_system_without_a_text_of_its_own_is_said_in_full(tmp_path, monkeypatch):
    def fails(*_, **__):
        raise OSError("of no number")

    monkeypatch.setattr(Path, "write_text", fails)
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


def test_an_output_above_an_input_is_refused_and_one_beside_it_is_not(tmp_path):
    source = tmp_path / "a" / "base"
    for out in (source, tmp_path / "a", tmp_path, source / ".." / "base"):
        with pytest.raises(esft.InputError, match="would replace"):
            check_apart(out, source)
    with pytest.raises(esft.InputError, match=rf"^{source}: the output would replace {source}, which is read$"):
        check_apart(source, tmp_path / "other", str(source))
    (tmp_path / "link").symlink_to(tmp_path / "a")
    for out, read in ((tmp_path / "link", source), (tmp_path / "a" / "base", tmp_path / "link" / "base")):
        with pytest.raises(esft.InputError, match="would replace"):
            check_apart(out, read)
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


def test_a_new_file_needs_a_folder_and_replaces_nothing_but_files(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name, said in (
        ("pipe", "is no regular file, and is not replaced"),
        ("loop", "is no regular file, and is not replaced"),
        ("no/such", f"{tmp_path}/no is not a folder"),
        ("loop/x", f"{tmp_path}/loop is not a folder"),
    ):
        with pytest.raises(esft.InputError, match=f"^{tmp_path}/{name}: {said}$"):
            check_new_file(tmp_path / name, overwrite=True)
    check_new_file(tmp_path / "new")

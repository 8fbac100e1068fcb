import errno
import os
import re
import shutil
from pathlib import Path

import pytest
from safetensors import SafetensorError

import esft
from esft.errors import DiskError, InputError
from esft.storage.files import write_json
from esft.storage.outputs import check_apart, check_new_file, check_new_folder, entries, new_folder, recover
from esft.storage.reading import read_json


def ours(*names: str):
    """What an earlier output consists of, for ``new_folder``."""
    return lambda _: names


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


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
    with pytest.raises(RuntimeError), new_folder(tmp_path / "out", ours("old")):
        raise RuntimeError
    assert content(tmp_path) == {"out/old": b"1"}


def test_an_old_folder_of_ours_is_replaced_when_said_so_and_others_beside_it_are_not_touched(tmp_path):
    out = tmp_path / "out"
    with new_folder(out) as folder:
        (folder / "old").write_text("1")
    for name in (".out.tmp", ".out.old", "out.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("mine")
    with pytest.raises(InputError, match="holds something already"), new_folder(out):
        pass
    with new_folder(out, ours("old", "older")) as folder:
        assert folder.parent.parent == tmp_path  # on the same disk, so that a rename does it
        assert not list(folder.iterdir())
        assert (out / "old").exists()
        (folder / "new").write_text("1")
    mine = {f"{name}/mine": b"mine" for name in (".out.tmp", ".out.old", "out.tmp")}
    assert content(tmp_path) == {"out/new": b"1"} | mine


@pytest.mark.parametrize("mine", ["thesis", "below/thesis", ".thesis", "empty/"])
def test_a_folder_with_what_is_not_ours_is_not_replaced_even_where_it_comes_while_the_new_one_is_made(tmp_path, mine):
    out = tmp_path / "out"
    (out / "below").mkdir(parents=True)
    (out / "old").write_text("1")
    (out / "below" / "old").write_text("1")

    def add() -> None:
        (out / mine).mkdir() if mine.endswith("/") else (out / mine).write_text("mine")

    for late in (True, False):
        with (
            pytest.raises(InputError, match=rf"/out: holds {mine.rstrip('/')}, which is no part of what is overwr"),
            new_folder(out, ours("old", "below/old")) as folder,
        ):
            (folder / "new").write_text("1")
            assert late
            add()
        assert (out / mine).exists() and (out / "old").exists() and (out / "below" / "old").exists()
        assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_link_in_a_folder_is_not_ours_by_what_it_leads_to(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "old").write_text("mine")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "below").symlink_to(tmp_path / "mine")
    assert list(entries(tmp_path / "out")) == ["below"]
    with pytest.raises(InputError, match="out: holds below, which"), new_folder(tmp_path / "out", ours("below/old")):
        pass
    assert (tmp_path / "mine" / "old").exists()


def test_a_folder_that_is_being_written_is_not_written_by_another(tmp_path):
    with new_folder(tmp_path / "out") as folder:
        (folder / "first").write_text("1")
        again = new_folder(tmp_path / "out")
        with pytest.raises(InputError, match=rf"^{tmp_path}/out: in use by process {os.getpid()} on .* since 2"), again:
            pass
    assert content(tmp_path) == {"out/first": b"1"}


def killed(monkeypatch, at: int, path: Path, *earlier) -> None:
    """Write a folder, and be killed before the given rename: nothing that comes after it is done."""
    monkeypatch.setattr(os, "replace", dies := Dies(os.replace, at))
    monkeypatch.setattr("esft.storage.outputs.shutil.rmtree", lambda *_, **__: None)
    monkeypatch.setattr("esft.storage.locks.Path.unlink", lambda *_, **__: None)
    monkeypatch.setattr("esft.storage.outputs.Path.rmdir", lambda *_, **__: None)
    with pytest.raises(SystemExit), new_folder(path, *earlier) as folder:
        (folder / "file").write_text("new")
        if not at:
            raise SystemExit
    assert dies.calls == at
    monkeypatch.undo()


class Dies:
    def __init__(self, real, at: int):
        self.real, self.at, self.calls = real, at, 0

    def __call__(self, *args):
        self.calls += 1
        if self.calls >= self.at:
            raise SystemExit
        return self.real(*args)


@pytest.mark.parametrize(("at", "after"), [(0, b"old"), (1, b"old"), (2, b"new")])
@pytest.mark.parametrize("by", ["new_folder", "recover"])
def test_what_a_kill_leaves_is_cleared_away_and_no_folder_is_lost(tmp_path, monkeypatch, at, after, by: str):
    out = tmp_path / "out"
    out.mkdir()
    (out / "file").write_text("old")
    killed(monkeypatch, at, out, ours("file"))
    assert out.exists() == (at < 2)
    if by == "recover":
        recover(tmp_path, re.compile("out"))
    else:
        with pytest.raises(RuntimeError), new_folder(out, ours("file")):
            raise RuntimeError
    assert content(tmp_path) == {"out/file": after}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_after_a_kill_a_folder_is_written_anew(tmp_path, monkeypatch):
    killed(monkeypatch, 1, tmp_path / "out")
    assert (tmp_path / ".out.esft").exists()
    with new_folder(tmp_path / "out") as folder:
        assert not list(folder.iterdir())
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("held", [["thesis"], ["new"], ["lock", "new", "thesis"]])
def test_what_has_the_name_of_unfinished_work_but_is_not_is_left_alone(tmp_path, held: list[str]):
    beside = tmp_path / ".out.esft"
    beside.mkdir()
    for name in held:
        (beside / name).write_text("mine")
    with pytest.raises(InputError, match=r"/\.out\.esft: is in the way"), new_folder(tmp_path / "out"):
        pass
    recover(tmp_path, re.compile("other"))
    if "thesis" in held:
        recover(tmp_path, re.compile("out"))
    assert content(beside) == dict.fromkeys(held, b"mine")


def test_a_file_under_that_name_is_left_alone(tmp_path):
    (tmp_path / ".out.esft").write_text("mine")
    with pytest.raises(InputError, match=r"/\.out\.esft: is in the way"), new_folder(tmp_path / "out"):
        pass
    assert content(tmp_path) == {".out.esft": b"mine"}


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
        if str(source).endswith("/new"):
            raise OSError(errno.EIO, "Input/output error", str(source))
        replace(source, target)

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(esft.DiskError, match=r"Input/output error$"), new_folder(out, ours("old")):
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
    out, tmp = tmp_path / "out", tmp_path / ".out.esft" / "new"
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
        new_folder(tmp_path / "file", ours()),
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
        check_new_file(tmp_path, read_json)
    asked = []
    monkeypatch.setattr(os, "access", lambda path, mode: asked.append((path, mode)))
    for check, path in ((check_new_file, tmp_path / "x.json"), (check_new_folder, tmp_path / "deep" / "x")):
        with pytest.raises(esft.InputError, match=rf"^{path}: {tmp_path} cannot be written to$"):
            check(str(path))
    assert asked == [(tmp_path, os.W_OK | os.X_OK)] * 2


def test_a_new_file_may_be_anywhere_but_on_another_unless_said_so(tmp_path):
    write_json(tmp_path / "x.json", 1)
    check_new_file(tmp_path / "y.json")
    with pytest.raises(esft.InputError, match=rf"/er/y\.json: {tmp_path}/er is not a folder$"):
        check_new_file(tmp_path / "er" / "y.json")
    check_new_file(str(tmp_path / "x.json"), read_json)
    with pytest.raises(esft.InputError, match=r"/x\.json: exists already \(`overwrite=True`"):
        check_new_file(tmp_path / "x.json")
    with pytest.raises(esft.InputError, match=r": is a folder$"):
        check_new_file(tmp_path)


@pytest.mark.parametrize("name", ["new/", "new//", "new/.", "x.json/", "x.json/."])
def test_a_name_that_is_a_folders_is_no_new_file(tmp_path, name: str):
    write_json(tmp_path / "x.json", 1)
    with pytest.raises(esft.InputError, match=rf"/{name}: names a folder, and a file is written$"):
        check_new_file(f"{tmp_path}/{name}", read_json)
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_only_a_file_of_its_kind_or_an_empty_one_is_overwritten(tmp_path):
    (tmp_path / "thesis").write_text("years of work")
    with pytest.raises(InputError, match=r"/thesis: holds something else, and is not overwritten \(.*not JSON"):
        check_new_file(tmp_path / "thesis", read_json)
    (tmp_path / "thesis").write_text("")
    check_new_file(tmp_path / "thesis", read_json)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="pipe: is no ordinary file"):
        check_new_file(tmp_path / "pipe", read_json)


def test_a_file_is_not_written_over_an_input_nor_into_one(tmp_path):
    model, data = tmp_path / "model", tmp_path / "d.json"
    model.mkdir()
    for file in (data, model / "config.json"):
        write_json(file, 1)
    (tmp_path / "soft").symlink_to(data)
    (tmp_path / "inside").symlink_to(model / "config.json")
    (tmp_path / "models").symlink_to(model)
    os.link(data, tmp_path / "hard")
    for out in ("d.json", "soft", "hard", "model/../d.json"):
        with pytest.raises(InputError, match="would replace .*/d.json, which is read"):
            check_new_file(tmp_path / out, read_json, [None, model, data])
    (model / "below").mkdir()
    for out in ("model/config.json", "inside", "models/config.json", "model/new.json", "model/below/new.json"):
        with pytest.raises(InputError, match=f"{out}: lies in .*/model, which is read"):
            check_new_file(tmp_path / out, read_json, [model, data])
    check_new_file(tmp_path / "new.json", read_json, [model, data, "a-hub/name"])


def test_a_loop_of_links_is_named(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    for check in (check_new_file, check_new_folder, check_apart, lambda path: new_folder(path).__enter__()):
        with pytest.raises(InputError, match="^[^\n]*/a: [^\n]*$"):
            check(tmp_path / "a")


def test_a_new_folder_may_be_anywhere_but_on_another_that_holds_something_unless_said_so(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / ".hidden").write_text("")
    for path in ("empty", "deep/er"):
        check_new_folder(str(tmp_path / path))
    check_new_folder(tmp_path / "full", ours(".hidden"))
    with pytest.raises(esft.InputError, match=r"/full: holds something already \(`overwrite=True`"):
        check_new_folder(tmp_path / "full")
    with pytest.raises(esft.InputError, match=r"/\.hidden: is a file, not a folder"):
        check_new_folder(tmp_path / "full" / ".hidden", ours())


def test_an_output_above_an_input_is_refused_and_one_beside_it_is_not(tmp_path):
    source = tmp_path / "a" / "base"
    for out in (source, tmp_path / "a", tmp_path, source / ".." / "base"):
        with pytest.raises(esft.InputError, match="would replace"):
            check_apart(out, source)
    with pytest.raises(esft.InputError, match=rf"^{source}: the output would replace {source}, which is read$"):
        check_apart(source, None, tmp_path / "other", str(source))
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
        for text in "12":
            with new_folder(tmp_path / link, ours("file")) as folder:
                (folder / "file").write_text(text)
        assert (tmp_path / link).is_symlink() and (tmp_path / target / "file").read_text() == "2"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dangling", "link", "new", "real"]


def test_the_working_folder_is_not_replaced(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    for path in (".", "..", tmp_path, tmp_path / "work"):
        with (
            pytest.raises(esft.InputError, match="the working folder cannot be replaced"),
            new_folder(path, entries_of),
        ):
            pass
    assert [p.name for p in tmp_path.iterdir()] == ["work"]


def entries_of(path: Path) -> list[str]:
    return list(entries(path))


def test_an_empty_folder_is_no_reason_to_drop_what_was_whole(tmp_path):
    for name in ("new", "old"):
        (tmp_path / ".x.esft" / name).mkdir(parents=True)
        (tmp_path / ".x.esft" / name / "file").write_text(name)
    (tmp_path / "x").mkdir()
    recover(tmp_path, re.compile("x"))
    assert (tmp_path / "x" / "file").read_text() == "new" and [path.name for path in tmp_path.iterdir()] == ["x"]


def test_the_bytes_of_a_folder_are_on_the_disk_before_its_name_is(tmp_path, monkeypatch):
    done, replace, sync = [], os.replace, os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: done.append(os.fstat(number).st_size) or sync(number))
    monkeypatch.setattr(os, "replace", lambda *paths: done.append("replace") or replace(*paths))
    with new_folder(tmp_path / "out") as folder:
        (folder / "sub").mkdir()
        (folder / "a").write_bytes(b"123")
        (folder / "sub" / "b").write_bytes(b"12345")
    assert sorted(done[:-1]) == [3, 5] and done[-1] == "replace"


@pytest.mark.parametrize("check", [check_new_file, check_new_folder])
def test_a_name_that_cannot_be_given_is_refused_before_any_work(tmp_path, check):
    for name, said in (("x" * 300, "File name too long"), ("", "is no path"), ("\udcff", "is no name in UTF-8")):
        with pytest.raises(esft.InputError, match=said):
            check(tmp_path / name if name else name)


@pytest.mark.parametrize("beside", ["adapter.safetensors", "esft_run.json"])
@pytest.mark.parametrize("text", ["", "{}"])
def test_a_file_that_may_be_a_part_of_weights_or_of_a_run_is_not_overwritten(tmp_path, beside: str, text: str):
    (tmp_path / "expert_cfg.json").write_text(text)
    check_new_file(tmp_path / "expert_cfg.json", lambda path: None)
    (tmp_path / beside).touch()
    check_new_file(tmp_path / "another.json", lambda path: None)
    said = rf"expert_cfg\.json: lies beside {beside}, may be a part of the same, and is not overwritten$"
    with pytest.raises(InputError, match=said):
        check_new_file(tmp_path / "expert_cfg.json", lambda path: None)


def test_a_folder_that_goes_while_it_is_looked_at_is_one_error(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()

    def gone(path):
        shutil.rmtree(path)
        return list(entries(path))

    with pytest.raises(DiskError, match="/out: No such file or directory$"):
        check_new_folder(tmp_path / "out", gone)


def test_what_begins_as_a_shells_name_of_a_home_is_no_output(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for check, name in ((check_new_file, "~"), (check_new_folder, "~/run"), (check_new_folder, "~somebody/run")):
        with pytest.raises(esft.InputError, match=f"^{name}: (begins with ~, which no shell|~.* is not a folder)"):
            check(name)
    check_new_folder("run~")
    check_new_folder(tmp_path / "~")


def test_a_link_among_what_is_not_whole_yet_is_in_the_way(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / ".out.esft").mkdir()
    (tmp_path / ".out.esft" / "lock").touch()
    (tmp_path / ".out.esft" / "old").symlink_to(tmp_path / "mine")
    with pytest.raises(InputError, match=r"\.out\.esft: is in the way"), new_folder(tmp_path / "out"):
        pass
    assert (tmp_path / ".out.esft" / "old").is_symlink() and not (tmp_path / "out").exists()


def test_what_lies_in_a_folder_that_is_closed_is_named(tmp_path, monkeypatch):
    """As for a user who may not enter it; the tests may run as one who may enter every folder."""
    real = os.stat

    def stat(path, *args, **named):
        if "closed/" in str(path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path, *args, **named)

    (tmp_path / "closed").mkdir()
    monkeypatch.setattr(os, "stat", stat)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(esft.InputError, match=f"closed/x.json: {tmp_path}/closed cannot be written to$"):
        check_new_file(tmp_path / "closed" / "x.json")
    with pytest.raises(esft.DiskError, match="closed/x: Permission denied$"):
        check_new_folder(tmp_path / "closed" / "x")
    check_apart(tmp_path / "closed" / "x", tmp_path / "d.jsonl")


def test_a_file_that_cannot_be_read_is_not_overwritten(tmp_path):
    def closed(path: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    write_json(tmp_path / "x.json", 1)
    with pytest.raises(InputError, match=r"/x\.json: Permission denied$"):
        check_new_file(tmp_path / "x.json", closed)

"""Where a run begins, goes on, or takes another's place; with runs of a few files, that nothing has trained."""

import errno
import importlib
import os
import shutil
from pathlib import Path

import pytest

from esft.errors import DiskError, InputError
from esft.runs.opened import cleared, latest, opened
from esft.runs.run_folder import RunFolder
from tests.esft.small_runs import SELECTION, settings

ORIGIN = {"model": "m", "data": "d", "digests": {"model": "1", "data": "2"}}
module = importlib.import_module("esft.runs.opened")


def fill(folder: RunFolder, text: str, whole: bool = True) -> None:
    """What a training leaves in a run, short."""
    folder.begin(settings(), ORIGIN, SELECTION if text == "one" else None)
    (folder.path / "metrics.jsonl").write_text(f'{{"step": 1, "{text}": 1}}\n')
    if whole:
        with folder.outcome("adapter" if text == "one" else "model") as place:
            (place / "weights").write_text(text)
        folder.write_summary({"steps": 1, "text": text})


def tree(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


@pytest.fixture
def run(tmp_path):
    """A whole run."""
    with opened(tmp_path / "run", resume=False, overwrite=False) as folder:
        fill(folder, "one")
    return tmp_path / "run"


@pytest.fixture
def two(tmp_path):
    """What is left when another run has taken its place."""
    fill(RunFolder(tmp_path / "two"), "two")
    return tree(tmp_path / "two")


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["run", "deep/er/run"])
def test_a_run_is_begun_in_a_folder_of_its_own_which_goes_where_nothing_was_written(tmp_path, name, overwrite: bool):
    with pytest.raises(KeyError), opened(tmp_path / name, False, overwrite):
        assert (tmp_path / name / ".esft.lock").is_file()
        raise KeyError
    assert not list(tmp_path.iterdir())
    (tmp_path / name).mkdir(parents=True)
    with pytest.raises(KeyError), opened(tmp_path / name, False, overwrite) as folder:
        assert folder.path == tmp_path / name
        raise KeyError
    assert not list((tmp_path / name).iterdir())


def test_a_link_to_a_run_is_the_run(tmp_path, run):
    (tmp_path / "link").symlink_to(run)
    with opened(tmp_path / "link", True, False) as folder:
        assert folder.path == run
        with pytest.raises(InputError, match="run: in use by process"), opened(run, True, False):
            pass


@pytest.mark.parametrize(
    ("held", "resume", "overwrite", "message"),
    [
        (["thesis"], False, False, r"holds something already \(`overwrite=True`"),
        (["thesis"], True, False, "holds no run to resume$"),
        (["thesis"], False, True, r"holds no run \(no esft_run.json\), and is not overwritten$"),
        (["config.yaml", "thesis"], False, True, r"holds no run \(no esft_run.json\), and is not overwritten$"),
        (["config.yaml"], True, False, "holds no run to resume$"),
        (["config.yaml", "origin.json", "thesis"], False, True, "not overwritten; it may be a run of an earlier ver"),
        (["thesis"], True, True, "exclude each other"),
    ],
)
def test_in_a_folder_of_others_nothing_changes(tmp_path, monkeypatch, held, resume, overwrite, message: str):
    for name in held:
        (tmp_path / name).write_text("mine")
    monkeypatch.setattr(module.RunFolder, "lock", lambda self: pytest.fail("locked") if len(held) < 3 else real(self))
    with pytest.raises(InputError, match=message), opened(tmp_path, resume, overwrite):
        pass
    assert tree(tmp_path) == dict.fromkeys(held, b"mine")


real = module.RunFolder.lock


@pytest.mark.parametrize("files", [["esft_run.json"], ["esft_run.json", "config.yaml", "experts.json"]])
def test_a_run_that_was_killed_before_it_had_begun_is_begun_again_but_not_resumed(tmp_path, files: list[str]):
    fill(RunFolder(tmp_path / "run"), "one", whole=False)
    for path in list((tmp_path / "run").iterdir()):
        if path.name not in files:
            path.unlink()
    for name in (".esft.lock", ".esft-0123abcd.tmp"):
        (tmp_path / "run" / name).write_text("")
    match = "no run to resume, it was broken off before its first step: begin it again"
    with pytest.raises(InputError, match=match), opened(tmp_path / "run", True, False):
        pass
    with opened(tmp_path / "run", False, False) as folder:
        fill(folder, "two")
    assert {"esft_run.json", "model"} < {p.name for p in (tmp_path / "run").iterdir()}
    assert not list((tmp_path / "run").glob(".*")) and not (tmp_path / "run" / "experts.json").exists()


def test_a_run_is_replaced_when_the_other_is_whole(tmp_path, run, two):
    before = tree(run)
    with opened(run, False, True) as folder:
        assert folder.path == run / "overwriting"
        fill(folder, "two")
        assert before.items() <= tree(run).items()
        assert latest(run).path == folder.path
    assert tree(run) == two
    assert latest(run).path == run


def test_a_run_that_is_to_replace_another_goes_on_or_is_begun_again(tmp_path, run, two):
    before = tree(run)
    for _ in range(2):
        with pytest.raises(KeyError), opened(run, False, True) as folder:
            fill(cleared(folder), "two", whole=False)
            raise KeyError
        assert {name: b for name, b in tree(run).items() if not name.startswith("overwriting/")} == before
    with opened(run, True, False) as folder:
        assert folder.path == run / "overwriting"
        fill(folder, "two")
    assert tree(run) == two


def test_a_run_that_is_to_replace_another_stays_until_one_is_begun_in_its_place(run):
    with pytest.raises(KeyError), opened(run, False, True) as folder:
        fill(folder, "two", whole=False)
        (folder.path / "checkpoints" / "step-000002").mkdir(parents=True)
        raise KeyError
    begun = tree(run)
    with pytest.raises(InputError), opened(run, False, True):
        raise InputError("no such model")
    assert tree(run) == begun
    with pytest.raises(KeyError), opened(run, False, True) as folder:
        (folder.path / ".esft.lock").write_text("")
        assert [p.name for p in cleared(folder).path.iterdir()] == [".esft.lock"]
        raise KeyError
    assert latest(run).path == run


def test_what_somebody_puts_into_a_run_before_it_begins_stays(tmp_path, run):
    with opened(tmp_path / "new", False, False) as folder:
        (folder.path / "thesis").write_text("mine")
        fill(cleared(folder), "two")
    assert (tmp_path / "new" / "thesis").read_text() == "mine"
    with pytest.raises(KeyError), opened(run, False, True) as folder:
        fill(folder, "two", whole=False)
        raise KeyError
    with pytest.raises(InputError, match="holds thesis, which no run has written"), opened(run, False, True) as folder:
        (folder.path / "thesis").write_text("mine")
        cleared(folder)
    assert (folder.path / "thesis").read_text() == "mine" and folder.begun


@pytest.mark.parametrize("mine", ["thesis", "adapter/thesis", "checkpoints/step-000001/thesis", "tensorboard/thesis"])
def test_a_run_with_what_it_has_not_written_is_not_overwritten(run, mine: str):
    (run / mine).parent.mkdir(parents=True, exist_ok=True)
    (run / mine).write_text("mine")
    before = tree(run)
    match = f"run: holds {mine}, which no run has written; move it"
    with pytest.raises(InputError, match=match), opened(run, False, True):
        pass
    assert tree(run) == before


def test_what_comes_while_the_other_run_is_made_is_left_alone_and_so_is_that_run(run, two):
    match = "move it elsewhere first, and `resume=True`: the new run is whole, in .*"
    with pytest.raises(InputError, match=match), opened(run, False, True) as folder:
        fill(folder, "two")
        (run / "thesis").write_text("mine")
    assert (run / "thesis").read_text() == "mine" and (run / "adapter" / "weights").read_text() == "one"
    (run / "thesis").rename(run.parent / "thesis")
    with opened(run, True, False) as folder:
        assert folder.path == run
    assert tree(run) == two


def test_what_a_user_has_put_into_the_outcome_is_not_taken_by_a_run_that_goes_on(run):
    (run / "adapter" / "README.md").write_text("mine")
    before = tree(run)
    with pytest.raises(InputError, match=r"adapter: holds README.md, which is no part"), opened(run, True, False):
        pass
    assert tree(run) == before


class Killed(BaseException):
    """Nothing is done after it, as ``os.replace`` and the rest only raise it again."""


def test_a_kill_at_any_rename_of_the_exchange_is_made_good(tmp_path, run, two, monkeypatch):
    shutil.copytree(run, tmp_path / "saved")
    for at in range(99):
        shutil.rmtree(run)
        shutil.copytree(tmp_path / "saved", run)
        calls = iter(range(99))

        def dies(function):
            def called(*args, **named):
                if next(calls) >= at:  # noqa: B023
                    raise Killed
                return function(*args, **named)

            return called

        try:
            with opened(run, False, True) as folder:
                fill(folder, "two")
                monkeypatch.setattr(os, "replace", dies(os.replace))
                monkeypatch.setattr(module.shutil, "rmtree", dies(shutil.rmtree))
        except Killed:
            monkeypatch.undo()
            with opened(run, True, False) as folder:
                assert folder.path == run
            assert tree(run) == two
        else:
            monkeypatch.undo()
            assert at > 10
            return
    pytest.fail("never got through")


@pytest.mark.parametrize("resume", [False, True])
def test_where_no_folder_can_be_the_place_is_named(tmp_path, resume: bool):
    (tmp_path / "file").write_text("mine")
    for place, said in (("file", "is a file, not a folder$"), ("file/run", ".*")):
        with pytest.raises(InputError, match=f"^{tmp_path / place}: {said}"), opened(tmp_path / place, resume, False):
            pass
    assert (tmp_path / "file").read_text() == "mine"


def test_a_run_that_another_process_has_just_made_is_in_use_and_not_broken_off(tmp_path):
    with opened(tmp_path / "run", False, False) as folder:
        with pytest.raises(InputError, match="run: in use by process"), opened(tmp_path / "run", True, False):
            pass
        fill(folder, "one")


def test_what_the_holder_of_a_run_of_before_markers_writes_is_left_alone(tmp_path):
    run = tmp_path / "run"
    fill(RunFolder(run), "one", whole=False)
    (run / "esft_run.json").unlink()
    with opened(run, True, False):
        (run / ".esft-0123abcd.tmp").write_text("half")
        with pytest.raises(InputError, match="run: in use by process"), opened(run, True, False):
            pass
        assert (run / ".esft-0123abcd.tmp").read_text() == "half"


def test_what_a_kill_left_of_a_run_that_was_to_replace_another_does_not_hinder_the_next(run, two):
    with pytest.raises(KeyError), opened(run, False, True) as folder:
        fill(folder, "two", whole=False)
        raise KeyError
    (run / "overwriting" / ".model.esft" / "new").mkdir(parents=True)
    (run / "overwriting" / ".model.esft" / "lock").write_text("")
    with opened(run, False, True) as folder:
        fill(folder, "two")
    assert tree(run) == two


def test_a_run_goes_on_where_another_was_killed_before_it_had_begun_to_replace_it(run):
    before = tree(run)
    with pytest.raises(KeyError), opened(run, False, True) as folder:
        fill(folder, "two", whole=False)
        raise KeyError
    for name in ("origin.json", "metrics.jsonl"):
        (folder.path / name).unlink()
    assert latest(run).path == run
    with opened(run, True, False) as folder:
        assert folder.path == run and not (run / "overwriting").exists()
    assert tree(run) == before


@pytest.mark.parametrize("resume", [False, True])
def test_what_a_kill_left_of_a_checkpoint_is_cleared_away_by_the_next_that_opens_the_run(run, resume: bool):
    left = run / "checkpoints" / ".step-000004.esft"
    (left / "new").mkdir(parents=True)
    for name in ("lock", "new/state.json"):
        (left / name).write_text("")
    with opened(run, resume, not resume):
        assert not left.exists()


@pytest.mark.parametrize(
    "name", ["overwriting", "overwriting-done", "overwriting/replaced", "overwriting-done/replaced"]
)
@pytest.mark.parametrize("resume", [False, True])
def test_a_link_or_a_file_where_another_run_would_be_is_refused_and_nothing_moves(tmp_path, run, name, resume: bool):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis").write_text("years of work")
    (run / name).parent.mkdir(exist_ok=True)
    for make in (lambda path: path.symlink_to(tmp_path / "mine"), Path.touch):
        make(run / name)
        before = tree(tmp_path)
        with pytest.raises(InputError, match=rf"/{name}: is no folder, where a run has one of its own"):
            opened(run, resume, not resume).__enter__()
        assert tree(tmp_path) == before
        (run / name).unlink()


@pytest.mark.parametrize("name", ["overwriting-done", "replaced"])
def test_a_users_folder_under_a_name_of_ours_is_left_alone(run, name: str):
    (run / name).mkdir()
    (run / name / "thesis").write_text("years of work")
    before = tree(run)
    with pytest.raises(InputError, match="holds (replaced/)?thesis, which no run has written"):
        opened(run, False, True).__enter__()
    assert tree(run) == before


@pytest.mark.parametrize("place", ["before it is locked", "at the start", "in the block", "at the end"])
def test_a_disk_that_fails_is_one_error(tmp_path, monkeypatch, place: str):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    def opening():
        with opened(tmp_path / "run", resume=False, overwrite=False):
            monkeypatch.setattr("esft.runs.opened.RunFolder.holds", full if place == "at the end" else RunFolder.holds)
            if place == "in the block":
                full()

    if place in (early := {"before it is locked": "check_new_folder", "at the start": "RunFolder.recover"}):
        monkeypatch.setattr(f"esft.runs.opened.{early[place]}", full)
    with pytest.raises(DiskError, match="/run: No space left on device$"):
        opening()

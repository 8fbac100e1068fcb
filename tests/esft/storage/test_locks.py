import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from esft.errors import DiskError, InputError
from esft.storage.locks import locked
from tests.esft.processes import forked, status


@pytest.fixture
def holder(tmp_path):
    """Another process that holds ``tmp_path/lock``, until it is killed."""
    told, tell = os.pipe()

    def hold() -> None:
        with locked(tmp_path / "lock", Path("place")):
            os.write(tell, b"!")
            time.sleep(60)

    pid = forked(hold)
    os.close(tell)
    assert os.read(told, 1) == b"!"  # nothing where the other ended before
    yield pid
    os.kill(pid, signal.SIGKILL)
    status(pid)


def test_a_lock_is_for_one_process_which_the_other_is_told_in_one_line(tmp_path, holder):
    since = r"2\d+-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d\d:\d\d"
    expected = rf"^place: in use by process {holder} on {os.uname().nodename} since {since}: [^\n]+$"
    for _ in range(2):  # the first attempt takes nothing from the holder
        with pytest.raises(InputError, match=expected), locked(tmp_path / "lock", Path("place")):
            pass


def test_a_lock_whose_holder_was_killed_is_taken_over_and_none_is_left(tmp_path):
    def killed() -> None:
        with locked(tmp_path / "lock", Path("place")):
            os.kill(os.getpid(), signal.SIGKILL)

    for _ in range(2):
        assert status(forked(killed)) == -signal.SIGKILL
        assert (tmp_path / "lock").exists()
    with locked(tmp_path / "lock", Path("place")):
        assert f"process {os.getpid()} " in json.loads((tmp_path / "lock").read_text())["esft_lock"]
    assert not list(tmp_path.iterdir())


def test_of_many_processes_one_at_a_time_has_the_lock(tmp_path):
    """Each adds to a number in two steps, which would lose some of it if two did so at once."""
    (tmp_path / "n").write_text("0")

    def add() -> None:
        done = 0
        while done < 30:
            try:
                with locked(tmp_path / "lock", Path("place")):
                    value = int((tmp_path / "n").read_text())
                    time.sleep(0.0005)
                    (tmp_path / "n").write_text(str(value + 1))
                    done += 1
            except InputError:
                time.sleep(0.0002)

    assert [status(pid) for pid in [forked(add) for _ in range(4)]] == [0] * 4
    assert (tmp_path / "n").read_text() == "120"


def test_a_lock_is_for_one_thread_too(tmp_path):
    refused = []

    def other():
        try:
            with locked(tmp_path / "lock", Path("place")):
                pass
        except InputError as error:
            refused.append(str(error))

    with locked(tmp_path / "lock", Path("place")):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert len(refused) == 1 and f"process {os.getpid()} " in refused[0]


def test_where_no_lock_can_be_made_the_place_is_named_and_a_full_disk_does_not_hinder_it(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match=r"/file/lock: "), locked(tmp_path / "file" / "lock", tmp_path):
        pass

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with locked(tmp_path / "lock", tmp_path):
        assert (tmp_path / "lock").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_it_goes_when_the_block_fails(tmp_path):
    with pytest.raises(KeyError), locked(tmp_path / "lock", Path("place")):
        raise KeyError
    assert not list(tmp_path.iterdir())


def test_a_long_command_is_cut_and_control_characters_stay_out_of_the_message(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/esft", "train\x1b[2J\n", "x" * 999])
    twice = [locked(tmp_path / "lock", Path("place")) for _ in range(2)]
    with twice[0], pytest.raises(InputError) as raised, twice[1]:
        pass
    message = str(raised.value)
    assert message.isprintable() and "esft 'train\\x1b" in message and message.endswith("xxx...") and len(message) < 300


@pytest.mark.parametrize("content", ["", '{"esft_', '{"esft_lock": 3', '{"esft_lock": "process', "4242\nelsewhere\n"])
def test_one_that_a_kill_has_torn_or_left_where_there_is_no_flock_is_taken_over(tmp_path, content: str):
    (tmp_path / "lock").write_text(content)
    with locked(tmp_path / "lock", Path("place")):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", ["years of work", '{"esft": 1}', '{"a": 1}'])
def test_a_file_of_another_kind_under_its_name_is_left_alone(tmp_path, content: str):
    (tmp_path / "lock").write_text(content)
    with pytest.raises(InputError, match=r"/lock: is no lock of this program"), locked(tmp_path / "lock", tmp_path):
        pass
    (tmp_path / "link").symlink_to("lock")
    with pytest.raises(InputError, match=r"/link: is no lock of this program"), locked(tmp_path / "link", tmp_path):
        pass
    assert (tmp_path / "lock").read_text() == content and (tmp_path / "link").is_symlink()


def test_where_the_holder_cannot_be_told_it_is_another_process(tmp_path, holder):
    (tmp_path / "lock").write_text("")
    again = locked(tmp_path / "lock", Path("place"))
    with pytest.raises(InputError, match=r"^place: in use by another process$"), again:
        pass


def test_a_folder_under_its_name_is_left_alone(tmp_path):
    (tmp_path / "lock").mkdir()
    with pytest.raises(InputError, match=r"/lock: is no lock of this program"), locked(tmp_path / "lock", tmp_path):
        pass
    assert (tmp_path / "lock").is_dir()


def test_the_block_ends_well_though_somebody_has_removed_the_file(tmp_path):
    with locked(tmp_path / "lock", tmp_path):
        (tmp_path / "lock").unlink()
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="looks at what the process holds open")
def test_another_thread_may_end_the_block(tmp_path):
    opened = len(os.listdir("/proc/self/fd"))
    held = locked(tmp_path / "lock", Path("place"))
    held.__enter__()
    assert len(os.listdir("/proc/self/fd")) == opened + 1
    thread = threading.Thread(target=held.__exit__, args=(None, None, None))
    thread.start()
    thread.join()
    assert not list(tmp_path.iterdir()) and len(os.listdir("/proc/self/fd")) == opened


def test_the_lock_is_held_until_its_file_is_gone(tmp_path, monkeypatch):
    """Else another process could take it in between, and lose its file to this one."""
    seen, unlink = [], Path.unlink

    def looks(path: Path, *args, **more) -> None:
        with pytest.raises(InputError, match="in use by"), locked(tmp_path / "lock", Path("place")):
            pass
        seen.append(path.name)
        unlink(path, *args, **more)

    with locked(tmp_path / "lock", Path("place")):
        monkeypatch.setattr(Path, "unlink", looks)
    assert seen == ["lock"] and not list(tmp_path.iterdir())

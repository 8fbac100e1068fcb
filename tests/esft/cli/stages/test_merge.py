"""What ``esft merge`` hands over and prints."""

from pathlib import Path

from esft.cli.parser import main
from esft.cli.stages import merge
from tests.esft.cli.conftest import adapter, put, stage, usage, values


def test_merge_hands_over_and_prints(work, calls, capsys):
    adapter(work)
    calls.watch("merge", "there")
    stage("merge --model m --adapter a --out o")
    stage("merge --model m --adapter a --out o --overwrite")
    folder = Path("a")
    assert calls.of["merge"] == [(("m", folder, "o", False, False), {}), (("m", folder, "o", True, False), {})]
    assert capsys.readouterr().out.splitlines() == ["merged checkpoint in there"] * 2


def test_what_another_library_says_of_a_merge_names_the_model(work, calls, monkeypatch, capsys):
    def fails(*_):
        raise RuntimeError("no good")

    adapter(work)
    put(monkeypatch, "merge", fails)
    assert main("merge --model m --adapter a --out o".split()) == 2
    assert capsys.readouterr().err == "esft: m: cannot be used (RuntimeError: no good)\n"


def test_merge_is_called_like_this(monkeypatch):
    assert usage(monkeypatch, merge) == "--model MODEL --adapter ADAPTER --out OUT [--overwrite] [--trust-remote-code]"
    assert values(monkeypatch, "merge --model m --adapter a --out o") == {
        "model": "m", "adapter": "a", "out": "o", "overwrite": False, "trust_remote_code": False,
    }  # fmt: skip

"""What ``esft merge`` hands over and prints."""

from pathlib import Path

from esft.cli.stages import merge
from tests.esft.cli.conftest import adapter, stage, usage, values


def test_merge_hands_over_and_prints(work, calls, capsys):
    adapter(work)
    calls.watch("merge", "there")
    stage("merge --model m --adapter a --out o")
    stage("merge --model m --adapter a --out o --overwrite")
    folder = Path("a")
    assert calls.of["merge"] == [(("m", folder, "o", False, False), {}), (("m", folder, "o", True, False), {})]
    assert capsys.readouterr().out.splitlines() == ["merged checkpoint in there"] * 2


def test_merge_is_called_like_this(monkeypatch):
    assert usage(monkeypatch, merge) == "--model MODEL --adapter ADAPTER --out OUT [--overwrite] [--trust-remote-code]"
    assert values(monkeypatch, "merge --model m --adapter a --out o") == {
        "model": "m", "adapter": "a", "out": "o", "overwrite": False, "trust_remote_code": False,
    }  # fmt: skip

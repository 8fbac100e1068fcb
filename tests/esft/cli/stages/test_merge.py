"""What ``esft merge`` hands over and prints."""

from pathlib import Path

from tests.esft.cli.conftest import adapter, stage


def test_merge_hands_over_and_prints(work, calls, capsys):
    adapter(work)
    calls.watch("merge", "there")
    stage("merge --model m --adapter a --out o")
    stage("merge --model m --adapter a --out o --overwrite")
    folder = Path("a")
    assert calls.of["merge"] == [(("m", folder, "o", False, False), {}), (("m", folder, "o", True, False), {})]
    assert capsys.readouterr().out.splitlines() == ["merged checkpoint in there"] * 2

"""What ``esft report`` hands over and prints."""

from tests.esft.cli.conftest import stage


def test_report_hands_over_and_prints(work, calls, capsys):
    calls.watch("report", "a table")
    stage("report run")
    assert calls.of["report"] == [(("run",), {})]
    assert capsys.readouterr().out.splitlines() == ["a table"]

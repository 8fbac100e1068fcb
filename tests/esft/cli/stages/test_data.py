"""What ``esft data`` hands to the Python calls that it covers, and what it prints and writes."""

import pytest

from esft.cli.parser import main
from esft.cli.stages import data
from tests.esft.cli.conftest import NO_COUNTS, refused, stage, usage, values


def test_data_prints_the_figures_and_some_records_with_what_is_learnt_marked(work, calls, capsys):
    stage("data d.jsonl --model m --batch-size 2 --show 2 --trust-remote-code")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        "d.jsonl: 6 records, 78 tokens (longest 13), 0 truncated, 0 left out; loss on 30.8% of the tokens; padded, "
        "batches are 81.2% full"
    )
    assert lines[1:] == [
        line for c in "ab" for line in ("", f"<|bos|><|user|>say {c}<|end|><|assistant|>[[{c * 3}<|end|>]]")
    ]
    assert calls.of["load_tokenizer"] == calls.of["open_config"] == [(("m", True), {})]
    (work / "c.yaml").write_text("packing: true\nmax_length: 60\nstreaming: true\nsteps: 3\n")
    stage("data d.jsonl:1 d.jsonl:2 --model m --config c.yaml --batch-size 2 --show 1")
    assert "12 records" in (shown := capsys.readouterr().out) and "packed into rows of 60" in shown
    loaded = len(calls.of["load_tokenizer"])
    assert main("data absent.jsonl --model m".split()) == 2
    assert capsys.readouterr().err == "esft: absent.jsonl: No such file or directory\n"
    assert len(calls.of["load_tokenizer"]) == loaded  # as it comes first


def test_data_is_called_like_this(monkeypatch):
    shown = usage(monkeypatch, data)
    assert shown.startswith("--model MODEL [--show N] [--config CONFIG] [--batch-size X] [--micro-batch-size X] ")
    assert shown.endswith("[--trust-remote-code] [--quiet] DATA [DATA ...]")
    assert values(monkeypatch, "data d e --model m") == {
        **dict.fromkeys(data.OF_DATA), "paths": ["d", "e"], "model": "m", "show": 3, "config": None, "quiet": False,
        "trust_remote_code": False,
    }  # fmt: skip


@pytest.mark.parametrize("value", NO_COUNTS)
@pytest.mark.parametrize("option", ["--show"])
def test_a_number_that_is_none_is_refused_with_its_option(capsys, option: str, value: str):
    assert f"argument {option}: " in refused(capsys, f"data d --model m {option} {value}")

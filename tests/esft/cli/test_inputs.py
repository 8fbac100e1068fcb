"""What the options of a command name is loaded as they say, and checked before a model is."""

import pytest

from esft.cli.parser import main
from tests.esft.cli.conftest import stage


def test_a_model_is_trusted_only_where_that_is_said(work, calls):
    calls.watch("answer", ["one"])
    for flag, trusted in (("", False), ("--trust-remote-code", True)):
        stage(f"generate --model m --prompt x {flag}")
        assert calls.of["load_with_adapter"][-1][0][-3:] == (trusted, True, "bf16")
        assert calls.of["load_tokenizer"][-1] == calls.of["open_config"][-1] == (("m", trusted), {})


def test_an_adapter_that_is_not_there_is_told_before_a_model_is_loaded(work, calls, capsys):
    for text in ("eval --model m --data d.jsonl", "generate --model m --prompt x", "merge --model m --out o"):
        assert main([*text.split(), "--adapter", "absent"]) == 2
        assert capsys.readouterr().err == "esft: absent: not an adapter folder (no expert_cfg.json)\n"
    assert not calls.of


@pytest.mark.parametrize("stage_of", ["score --out o", "train --method full --out o", "eval"])
def test_data_that_is_not_there_is_told_before_a_model_is_loaded(work, calls, capsys, stage_of: str):
    assert main(f"{stage_of} --model m --data absent.jsonl".split()) == 2
    assert capsys.readouterr().err == "esft: absent.jsonl: No such file or directory\n"
    assert not calls.of


@pytest.mark.parametrize("stage_of", ["score --out o", "eval"])
def test_a_weight_of_data_that_is_measured_is_refused(work, calls, capsys, stage_of: str):
    assert main(f"{stage_of} --model m --data d.jsonl:2".split()) == 2
    assert capsys.readouterr().err.startswith("esft: d.jsonl:2: of data that is measured every record counts once")
    assert not calls.of

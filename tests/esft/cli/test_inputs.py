"""What the options of a command name is loaded as they say, and checked before a model is."""

import re
from argparse import Namespace
from pathlib import Path

import pytest

import esft
from esft.cli.inputs import adapter_of, encoder_for, named
from esft.cli.parser import main
from tests.esft.cli.conftest import adapter, stage


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


def test_data_is_named_where_there_are_several_and_may_be_where_there_is_one(work):
    (work / "x=y").touch()
    for texts, expected in (
        ([], {}),
        (["d.jsonl"], {"": "d.jsonl"}),
        (["a=d.jsonl"], {"a": "d.jsonl"}),
        (["a=d.jsonl", "b=d=e"], {"a": "d.jsonl", "b": "d=e"}),
        (["x=y"], {"": "x=y"}),  # a file that is there
        (["/a=b"], {"": "/a=b"}),
    ):
        assert named(texts, "--data") == expected


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["a=d", "e"], "--data e: of several, each needs a name: --data NAME=e"),
        (["a=d", "a=e"], "--data a=e: two have the name a"),
    ],
)
def test_several_without_names_of_their_own_are_refused(texts: list[str], message: str):
    with pytest.raises(esft.InputError, match=f"^{re.escape(message)}$"):
        named(texts, "--data")


@pytest.mark.parametrize(("asked", "length"), [(9, 9), (None, 256)])
def test_records_are_cut_where_that_is_said_or_at_the_models_positions(calls, asked: int | None, length: int):
    found = encoder_for(Namespace(model="m", trust_remote_code=False, max_length=asked))
    assert (found.max_length, found.vocabulary, found.tokenizer.pad_token_id) == (length, 300, 258)


def test_an_adapters_folder_is_found_where_one_is_named(work):
    adapter(work)
    assert adapter_of(Namespace(adapter="a")) == Path("a")
    assert adapter_of(Namespace(adapter=None)) is None


@pytest.mark.parametrize("stage_of", ["score --out o", "eval"])
def test_a_weight_of_data_that_is_measured_is_refused(work, calls, capsys, stage_of: str):
    assert main(f"{stage_of} --model m --data d.jsonl:2".split()) == 2
    assert capsys.readouterr().err.startswith("esft: d.jsonl:2: of data that is measured every record counts once")
    assert not calls.of

"""What ``esft generate`` hands to the Python calls that it covers, and what it prints and writes."""

from pathlib import Path

import pytest

from esft.cli.parser import main
from esft.cli.stages import generate
from esft.data.records import Record
from esft.selection import ExpertSelection
from tests.esft.cli.conftest import MODEL, NO_COUNTS, OF_MODEL, adapter, refused, stage, usage, values


def test_generate_loads_an_adapter_and_answers_every_prompt(work, calls, capsys):
    adapter(work)
    calls.watch("answer", ["one", "two"])
    stage("generate --model m --adapter a --prompt x --prompt y --max-new-tokens 7 --batch-size 3")
    assert calls.of["load_with_adapter"] == [(("m", Path("a"), "auto", "auto", "auto", False, True, "bf16"), {})]
    (((model, _, prompts, longest, batch_size), _),) = calls.of["answer"]
    assert (model, longest, batch_size) == ("a model", 7, 3)
    assert prompts == [Record([{"role": "user", "content": text}]) for text in "xy"]
    assert capsys.readouterr().out == "x\n    one\ny\n    two\n"


def test_prompts_name_their_adapters_where_there_are_several(work, calls, capsys):
    for name in ("a", "b=c"):
        (work / name).mkdir()
        ExpertSelection({1: [0]}).save(work / name / "expert_cfg.json")
    calls.watch("answer", ["one", "two", "three"])
    calls.watch("load_adapters", None)
    prompts = ["--prompt", "y:a: b", "--prompt", "__base__:", "--prompt", "x:y:"]
    assert main(["generate", "--model", "m", "--adapter", "x=a", "--adapter", "y=b=c", *prompts]) == 0
    assert calls.of["load_with_adapter"][0][0][:2] == ("m", None)
    assert calls.of["load_adapters"] == [(("a model", {"x": Path("a"), "y": Path("b=c")}), {})]
    (((_, _, asked, *_), named),) = calls.of["answer"]
    assert [record.messages[0]["content"] for record in asked] == ["a: b", "", "y:"]
    assert named == {"adapter_names": ("y", "__base__", "x")}
    assert capsys.readouterr().out == "y:a: b\n    one\n__base__:\n    two\nx:y:\n    three\n"
    calls.watch("answer", ["one"])
    stage("generate --model m --adapter b=c --prompt x")  # a folder of this name is there
    assert calls.of["load_with_adapter"][1][0][:2] == ("m", Path("b=c"))


def test_adapters_and_prompts_that_do_not_fit_are_named(work, calls, capsys):
    adapter(work)
    for options, message in {
        "--adapter a --adapter x=a --prompt x": "--adapter 'a': of several adapters each needs a name: NAME=FOLDER",
        "--adapter x=a --adapter x=a --prompt x": "--adapter 'x=a': the name 'x' is taken",
        "--adapter =a --prompt x": "--adapter '=a': has no name before =",
        "--adapter x=b --prompt x": "b: not an adapter folder (no expert_cfg.json)",
        "--adapter x=a --prompt x:y --prompt z:y": (
            "--prompt 'z:y': begins with no adapter's name and a colon; there are x, __base__"
        ),
        "--adapter x=a --prompt x": "--prompt 'x': begins with no adapter's name and a colon; there are x, __base__",
    }.items():
        assert main(f"generate --model m {options}".split()) == 2
        assert capsys.readouterr().err == f"esft: {message}\n"
    assert "load_with_adapter" not in calls.of


def test_a_prompt_that_is_too_long_is_refused_before_the_model_is_loaded(work, calls, capsys):
    for options, message in (
        ("--max-length 4", "prompt 1: has 11 tokens, more than --max-length 4"),
        ("--max-length 257", "--max-length 257 is beyond the model's 256 positions"),
        ("--prompt " + "x" * 1000, "prompt 2: has 1004 tokens, more than --max-length 256"),
    ):
        assert main(f"generate --model m --prompt hello-y {options}".split()) == 2
        assert capsys.readouterr().err == f"esft: {message}\n"
    assert "load_with_adapter" not in calls.of


def test_what_is_printed_holds_no_control_characters(work, calls, capsys):
    calls.watch("answer", ["a\x1b[2Jb\nc\u202ed"])
    stage("generate --model m --prompt x")
    assert capsys.readouterr().out == "x\n    a\\x1b[2Jb\nc\\u202ed\n"


def test_generate_is_called_like_this(monkeypatch):
    assert usage(monkeypatch, generate) == (
        f"{MODEL} [--batch-size RECORDS] [--adapter [NAME=]FOLDER] --prompt [NAME:]TEXT "
        "[--max-new-tokens MAX_NEW_TOKENS]"
    )
    assert values(monkeypatch, "generate --model m --prompt a --prompt b") == {
        **OF_MODEL, "batch_size": 64, "adapter": [], "prompt": ["a", "b"], "max_new_tokens": 128,
    }  # fmt: skip


@pytest.mark.parametrize("value", NO_COUNTS)
@pytest.mark.parametrize("option", ["--batch-size", "--max-length", "--max-new-tokens"])
def test_a_number_that_is_none_is_refused_with_its_option(capsys, option: str, value: str):
    assert f"argument {option}: " in refused(capsys, f"generate --model m --prompt a {option} {value}")

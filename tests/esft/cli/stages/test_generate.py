"""What ``esft generate`` hands to the Python calls that it covers, and what it prints and writes."""

from pathlib import Path

from esft.cli.parser import main
from esft.data.records import Record
from tests.esft.cli.conftest import adapter, stage


def test_generate_loads_an_adapter_and_answers_every_prompt(work, calls, capsys):
    adapter(work)
    calls.watch("answer", ["one", "two"])
    stage("generate --model m --adapter a --prompt x --prompt y --max-new-tokens 7 --batch-size 3")
    assert calls.of["load_with_adapter"] == [(("m", Path("a"), "auto", "auto", "auto", False, True, "bf16"), {})]
    (((model, _, prompts, longest, batch_size), _),) = calls.of["answer"]
    assert (model, longest, batch_size) == ("a model", 7, 3)
    assert prompts == [Record([{"role": "user", "content": text}]) for text in "xy"]
    assert capsys.readouterr().out == "x\n    one\ny\n    two\n"


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

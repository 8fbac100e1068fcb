"""Options that several commands have: what is asked for, what is refused, and what is said of them."""

import argparse

import pytest

import esft
from esft.cli.options import add_inference, as_text
from esft.cli.parser import main
from tests.esft.cli.conftest import MODEL, OF_MODEL, values


def test_a_model_is_named_and_loaded_with_these_options():
    parser = argparse.ArgumentParser("esft", add_help=False)
    add_inference(parser, "tokens of a record")
    usage = " ".join(parser.format_usage().split())
    assert usage == f"usage: esft {MODEL} [--batch-size RECORDS] [--adapter ADAPTER]"
    assert vars(parser.parse_args(["--model", "m"])) == {**OF_MODEL, "batch_size": 64, "adapter": None}


def test_the_values_of_a_training_become_settings(monkeypatch):
    got = values(
        monkeypatch,
        "train --model m --data d --out o --micro-batch-size 2 --lr 1e-3 --steps 3 --warmup-steps 4 --decay 0.5 "
        "--seed 6 --max-length 7 --batch-size 8",
    )
    expected = {
        "micro_batch_size": 2, "lr": 1e-3, "steps": 3, "warmup_steps": 4, "decay": 0.5, "seed": 6, "max_length": 7,
        "batch_size": 8,
    }  # fmt: skip
    config = esft.TrainConfig.load(None, **{name: got[name] for name in expected})
    assert config == esft.TrainConfig(**expected)


@pytest.mark.parametrize(
    "text",
    [
        "train --model m --data d --out o --method sft",
        "train --model m --data d --out o --recompute all",
        "train --model m --data d --out o --dtype int8",
        "train --model m --data d --out o --backend gpu",
        "select --scores s --out o --by name",
    ],
)
def test_a_choice_that_there_is_not_is_refused(capsys, text: str):
    with pytest.raises(SystemExit, match="2"):
        main(text.split())
    assert f"invalid choice: '{text.split()[-1]}'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("stage", "lines"),
    [
        (
            "train",
            (
                "--method {esft,full,lora} what trains: the selected experts, everything, or LoRA (PEFT) (default ",
                "--lr X learning rate; where none is given, the paper's for the method --steps X optimizer steps ",
                "--load-best-model-at-end [{true,false}] keep what was best, not what came last (default false)",
            ),
        ),
        (
            "eval",
            (
                "--model MODEL checkpoint folder or hub id --dtype {auto,bfloat16,float32} ",
                "--max-length TOKENS tokens of a record; longer ones are cut (default 4096, or the model's positions ",
                "--trust-remote-code run Python files that the checkpoint holds; read them first",
                "--quiet no bars, and no warnings of other libraries --batch-size RECORDS",
                "--adapter ADAPTER adapter folder, ESFT's or PEFT's, or that of a run which holds one",
            ),
        ),
        ("plan", ("records of a step (default that of a micro batch, else 1)",)),
        ("chat", ("talk with a model: answers are shown while they are made, and Ctrl-C stops one",)),
    ],
)
def test_help_says_what_an_option_is_and_its_default(monkeypatch, capsys, stage: str, lines: tuple[str, ...]):
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit, match="0"):
        main([stage, "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert [line for line in lines if line not in shown] == []


def test_a_value_is_shown_as_yaml_has_it():
    assert [as_text(value) for value in (None, True, False, 3, 0.5, "auto")] == [
        "null",
        "true",
        "false",
        "3",
        "0.5",
        "auto",
    ]

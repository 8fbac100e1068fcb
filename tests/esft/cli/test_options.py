"""The options of every command: what is asked for, what is refused, and what a stage gets where nothing is said."""

from dataclasses import fields

import pytest

import esft
from esft.cli import parser as command
from esft.cli.options import as_text
from esft.cli.parser import main


def parsed(monkeypatch, text: str) -> dict:
    """What the stage of a command line gets."""
    got = []
    monkeypatch.setattr(command, "run_stage", got.append)
    assert main(text.split()) == 0
    return vars(got[0])


TRUST = {"trust_remote_code": False}
INFERENCE = {
    "model": "m",
    "dtype": "auto",
    "backend": "auto",
    "frozen": "auto",
    "frozen_linear": "bf16",
    "max_length": None,
    "quiet": False,
    **TRUST,
}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "score --model m --data d --out o",
            {
                **INFERENCE, "data": "d", "out": "o", "batch_size": 1, "max_tokens": 131_072, "overwrite": False,
                "outputs": False, "gradients": False, "adapter": None,
            },
        ),
        (
            "select --scores s --out o",
            {
                "scores": "s", "by": "token", "top_p": 0.2, "out": "o", "model": None, "shared_experts": False,
                "non_expert_modules": False, "plot": None, "overwrite": False, "experts_per_layer": None,
                "budget": None, "like": None, "against": None, "weight": None, "layers": 0, **TRUST,
            },
        ),
        (
            "train --model m --data d --out o",
            {
                **dict.fromkeys(field.name for field in fields(esft.TrainConfig)),
                **dict.fromkeys(("eval_data", "experts", "config", "mix")),
                "model": "m", "data": ["d"], "out": "o", "resume": False, "overwrite": False, "quiet": False,
                **TRUST,
            },
        ),
        (
            "eval --model m --data d",
            {
                **INFERENCE, "batch_size": 64, "adapter": None, "data": ["d"], "limit": None,
                "metrics": "loss,exact_match", "out": None, "overwrite": False,
            },
        ),
        (
            "generate --model m --prompt a --prompt b",
            {**INFERENCE, "batch_size": 64, "adapter": [], "prompt": ["a", "b"], "max_new_tokens": 128},
        ),
        ("chat --model m", {**INFERENCE, "adapter": None, "max_new_tokens": 1024}),
        (
            "merge --model m --adapter a --out o",
            {"model": "m", "adapter": "a", "out": "o", "overwrite": False, **TRUST},
        ),
        (
            "report r",
            {
                "run": "r", "html": None, "with": [], "scores": None, "scores_after": None, "eval_before": None,
                "eval_after": None, "overwrite": False,
            },
        ),
        ("compare r s", {"runs": ["r", "s"], "html": None, "overwrite": False}),
    ],
)  # fmt: skip
def test_a_stage_gets_these_values_where_nothing_else_is_said(monkeypatch, text: str, expected: dict):
    assert parsed(monkeypatch, text) == {"stage": text.split()[0], **expected}


def test_the_values_of_a_training_become_settings(monkeypatch):
    got = parsed(
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


REQUIRED = {
    "score": "--model m --data d --out o",
    "select": "--scores s --out o",
    "train": "--model m --data d --out o",
    "eval": "--model m --data d",
    "generate": "--model m --prompt a",
    "chat": "--model m",
    "merge": "--model m --adapter a --out o",
}


@pytest.mark.parametrize(("stage", "option"), [(s, o) for s, text in REQUIRED.items() for o in text.split()[::2]])
def test_what_a_stage_cannot_do_without_is_asked_for(capsys, stage: str, option: str):
    words = REQUIRED[stage].split()
    left = [word for i in range(0, len(words), 2) if words[i] != option for word in words[i : i + 2]]
    with pytest.raises(SystemExit, match="2"):
        main([stage, *left])
    assert capsys.readouterr().err == f"esft {stage}: the following arguments are required: {option}\n"


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
    ("stage", "option"),
    [
        ("score", "--max-tokens"), ("score", "--batch-size"), ("score", "--max-length"), ("select", "--top-p"),
        ("select", "--experts-per-layer"), ("select", "--budget"),
        ("eval", "--batch-size"), ("eval", "--max-length"), ("eval", "--limit"),
        ("generate", "--max-new-tokens"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("value", ["0", "-1", "many"])
def test_a_number_that_is_none_is_refused_with_its_option(capsys, stage: str, option: str, value: str):
    with pytest.raises(SystemExit, match="2"):
        main([stage, *REQUIRED[stage].split(), option, value])
    assert f"argument {option}: " in capsys.readouterr().err


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

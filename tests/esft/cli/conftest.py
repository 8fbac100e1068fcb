"""Stages whose Python calls are replaced, so that it is seen what a stage hands to them."""

import argparse
import importlib
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from transformers import PreTrainedConfig

from esft.cli import parser as command
from esft.cli.parser import main
from esft.selection import ExpertSelection
from tests.esft.models import tiny_tokenizer, write_records

# Where the stages import what they cover.
HOMES = {
    "load_skeleton": "esft.checkpoint.load",
    "load_tokenizer": "esft.checkpoint.load",
    "open_config": "esft.checkpoint.source",
    "moe_layers": "esft.experts.moe_layers",
    "score_experts": "esft.scoring.score",
    "gradient_scores": "esft.scoring.gradients",
    "plot_scores": "esft.scoring.plot",
    "windows": "esft.data.batches",
    "train": "esft.training.loop",
    "measure": "esft.evaluation.scores",
    "answer": "esft.evaluation.answers",
    "end_tokens": "esft.evaluation.answers",
    "load_with_adapter": "esft.adapters.load_any",
    "load_adapters": "esft.adapters.mixed",
    "merge": "esft.adapters.merge",
    "report": "esft.runs.report",
}


for home in HOMES.values():  # a module that is first imported later would keep what a test has put in another
    importlib.import_module(home)


def put(monkeypatch, name: str, value) -> None:
    monkeypatch.setattr(importlib.import_module(HOMES[name]), name, value)


@pytest.fixture
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_records(tmp_path / "d.jsonl", 6)
    return tmp_path


@pytest.fixture
def calls(monkeypatch):
    """The calls of what a stage covers, by name, in the place of which ``answers`` are given."""
    kept = SimpleNamespace(of={}, answers={})

    def watch(name: str, answer) -> None:
        def called(*args, **named):
            kept.of.setdefault(name, []).append((args, named))
            return kept.answers.get(name, answer)

        put(monkeypatch, name, called)

    kept.watch = watch
    watch("load_with_adapter", "a model")
    watch("end_tokens", [tiny_tokenizer().eos_token_id])
    watch("open_config", PreTrainedConfig(max_position_embeddings=256, vocab_size=300))
    watch("load_skeleton", "a skeleton")
    watch("load_tokenizer", tiny_tokenizer())
    return kept


def stage(text: str) -> None:
    assert main(text.split()) == 0


def adapter(work) -> None:
    (work / "a").mkdir()
    ExpertSelection({1: [0]}).save(work / "a" / "expert_cfg.json")


# How a model is named and loaded, and what a stage gets where nothing is said of it.
MODEL = (
    "--model MODEL [--dtype {auto,bfloat16,float32}] [--frozen {auto,bf16,int8,nf4,nf4_double,fp8,mxfp4}] "
    "[--frozen-linear {bf16,int8,nf4}] [--backend {auto,triton,cpu,cpu_packed,reference}] [--max-length TOKENS] "
    "[--trust-remote-code] [--quiet]"
)
OF_MODEL: dict[str, Any] = {
    "model": "m", "dtype": "auto", "backend": "auto", "frozen": "auto", "frozen_linear": "bf16", "max_length": None,
    "quiet": False, "trust_remote_code": False,
}  # fmt: skip
NO_COUNTS = ("0", "-1", "many")


def usage(monkeypatch, module: ModuleType) -> str:
    """How a stage is called, as its help begins, which has to say of every option what it is."""
    monkeypatch.setenv("COLUMNS", "9999")
    stages = argparse.ArgumentParser("esft").add_subparsers()
    module.add(stages)
    ((name, parser),) = stages.choices.items()
    assert [option.dest for option in parser._actions if not option.help] == []
    return parser.format_usage().removeprefix(f"usage: esft {name} [-h] ").rstrip()


def values(monkeypatch, text: str) -> dict[str, Any]:
    """What a stage gets of a command line."""
    got = []
    monkeypatch.setattr(command, "run_stage", got.append)
    assert main(text.split()) == 0
    found = vars(got[0])
    assert found.pop("stage") == text.split()[0]
    return found


def refused(capsys, text: str) -> str:
    """What is said of a command line that is none."""
    with pytest.raises(SystemExit, match="2"):
        main(text.split())
    return capsys.readouterr().err

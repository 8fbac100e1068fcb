"""Stages whose Python calls are replaced, so that it is seen what a stage hands to them."""

import importlib
from types import SimpleNamespace

import pytest
from transformers import PreTrainedConfig

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
    "plot_scores": "esft.scoring.plot",
    "windows": "esft.data.batches",
    "train": "esft.training.loop",
    "mean_loss": "esft.training.evaluate",
    "exact_match": "esft.training.evaluate",
    "answer": "esft.training.evaluate",
    "load_with_adapter": "esft.adapters.load_any",
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
    watch("open_config", PreTrainedConfig(max_position_embeddings=256, vocab_size=300))
    watch("load_skeleton", "a skeleton")
    watch("load_tokenizer", tiny_tokenizer())
    return kept


def stage(text: str) -> None:
    assert main(text.split()) == 0


def adapter(work) -> None:
    (work / "a").mkdir()
    ExpertSelection({1: [0]}).save(work / "a" / "expert_cfg.json")

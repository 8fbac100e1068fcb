"""The command, stage after stage on a model built here, and its one-line errors."""

import json
import shlex

import pytest
import torch
from transformers import AutoModelForCausalLM

from esft.__main__ import main
from esft.checkpoint import load_model
from esft.evaluate import load_any_adapter
from tests.esft.models import save_tiny, token_batch, write_records


@pytest.fixture
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "base")
    write_records(tmp_path / "d.jsonl")
    return tmp_path


def test_the_whole_path(work, capsys):
    stages = [
        "score --model base --data d.jsonl --out scores.json --max-length 64",
        "select --scores scores.json --model base --top-p 0.4 --out experts.json --plot experts.png",
        "train --model base --data d.jsonl --eval-data d.jsonl --experts experts.json --out run --steps 8 --lr 3e-3 "
        "--batch-size 8 --max-length 64 --quiet",
        "report run",
        "eval --model base --adapter run/adapter --data d.jsonl --quiet --out eval.json",
        "merge --model base --adapter run/adapter --out merged",
        "eval --model merged --data d.jsonl --quiet",
        "generate --model merged --prompt 'say a' --prompt 'say b' --max-new-tokens 4",
    ]
    printed = []
    for stage in stages:
        assert main(shlex.split(stage)) == 0, capsys.readouterr().err
        printed.append(capsys.readouterr().out)
    chosen = json.loads((work / "experts.json").read_text())
    assert set(chosen) == {"experts", "shared_experts", "non_expert_modules"}
    assert (work / "experts.png").read_bytes().startswith(b"\x89PNG")
    assert "tokens/s" in printed[3]
    with_adapter, merged = json.loads(printed[4]), json.loads(printed[6])
    assert with_adapter == pytest.approx(merged, rel=1e-5)
    assert len(json.loads((work / "eval.json").read_text())["answers"]) == 24
    assert [line for line in printed[7].splitlines() if not line.startswith(" ")] == ["say a", "say b"]
    tuned = load_any_adapter(load_model("base"), "run/adapter")
    stock = AutoModelForCausalLM.from_pretrained("merged").eval()
    assert torch.equal(stock(**token_batch()).logits, tuned(**token_batch()).logits)


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ("score --model base --data absent.jsonl --out s.json", "absent.jsonl: No such file"),
        ("score --model base --data d.jsonl --out there.json", "there.json: exists already"),
        ("score --model base --data d.jsonl --out no/s.json", "its folder does not exist"),
        ("score --model absent --data d.jsonl --out s.json", "absent: cannot load"),
        ("score --model base --data empty.jsonl --out s.json", "empty.jsonl: holds no records"),
        ("select --scores d.jsonl --out e.json", "d.jsonl: line 2: not JSON"),
        ("select --scores other.json --model base --out e.json", "score file is of another model"),
        ("select --scores other.json --top-p 1.5 --out e.json", "top_p must be in (0, 1], got 1.5"),
        ("train --model base --data d.jsonl --out run", "method esft needs expert selection"),
        ("train --model base --data d.jsonl --experts wrong.json --out run", "selection names layer 7"),
        ("train --model base --data d.jsonl --out base --method full", "base: holds something already"),
        ("train --model base --data d.jsonl --out run --method full --steps 0", "steps must be at least 1"),
        ("merge --model base --adapter base --out m", "base: not an adapter folder"),
        ("eval --model base --adapter absent --data d.jsonl", "absent: not an adapter folder"),
        ("report base", "base: not a run folder"),
    ],
)
def test_bad_input_is_one_clear_line_and_leaves_nothing(work, capsys, stage: str, message: str):
    (work / "there.json").write_text("{}")
    (work / "empty.jsonl").write_text("")
    (work / "other.json").write_text('{"token_scores": {"1": {"0": 1.0}}, "gate_scores": {"1": {"0": 0.5}}}')
    (work / "wrong.json").write_text('{"experts": {"7": [0]}}')
    before = sorted(work.rglob("*"))
    assert main(stage.split()) == 2
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if line.startswith("esft: ")]
    assert len(errors) == 1 and message in errors[0]
    assert sorted(work.rglob("*")) == before

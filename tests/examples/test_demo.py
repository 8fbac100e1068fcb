"""The demo, start to end on a model built here."""

import dataclasses

import pytest
import torch
from transformers import AutoModelForCausalLM

import esft
from esft.checkpoint.load import load_model
from examples import demo
from tests.esft.models import save_tiny, token_batch, write_records
from tests.esft.reporting.pages import read_page


@pytest.fixture
def small(tmp_path, monkeypatch):
    """The demo on a tiny model, for a few steps."""
    monkeypatch.setattr(demo, "MODEL", save_tiny(tmp_path / "base"))
    monkeypatch.setattr(demo, "ESFT", dataclasses.replace(demo.ESFT, steps=6, batch_size=8, eval_every=3, save_every=4))
    for split, count in {"train": 24, "validation": 8, "test": 10}.items():
        write_records(tmp_path / f"{split}.jsonl", count)
    return tmp_path


def test_the_demo_leaves_scores_picture_adapter_merged_checkpoint_and_page(small, capsys):
    out = small / "out"
    out.mkdir()
    (out / "stale").write_text("of an earlier run")
    demo.main(["--data", str(small), "--out", str(out)])
    printed = capsys.readouterr().out

    left = {path.name for path in out.iterdir()}
    assert left == {
        "scores.json", "experts.json", "experts.png", "run", "merged", "before.json", "after.json", "report.html",
    }  # fmt: skip
    page = read_page(out / "report.html")
    assert [section.attributes["id"] for section in page.all("section")] == [
        "choice", "course", "answers", "sizes", "settings", "origin",
    ]  # fmt: skip
    assert "--by token --top-p P, for P above" in page.one("section", id="choice").text
    assert page.one("section", id="answers").one("table").rows[1] == ["records", "10", "10"]
    assert (out / "experts.png").read_bytes().startswith(b"\x89PNG")
    selection = esft.ExpertSelection.load(out / "experts.json")
    chosen = esft.select_experts(esft.ExpertScores.load(out / "scores.json"), by="token", top_p=demo.TOP_P)
    assert selection.experts == chosen.experts and selection.shared_experts
    assert esft.ExpertSelection.load(out / "run" / "adapter" / "expert_cfg.json") == selection

    batch = token_batch()
    base = load_model(str(demo.MODEL))
    before = base(**batch).logits
    tuned = esft.load_adapter(base, out / "run" / "adapter")(**batch).logits
    assert torch.equal(AutoModelForCausalLM.from_pretrained(out / "merged").eval()(**batch).logits, tuned)
    assert not torch.allclose(tuned, before, atol=1e-2)

    assert "exact match on 10 commands" in printed
    assert "layer 1: " in printed and "layer 2: " in printed
    adapter, checkpoint = (out / "run" / "adapter", demo.MODEL)
    assert f"adapter {demo.size(adapter):.1f} MB, checkpoint {demo.size(checkpoint):.1f} MB" in printed
    assert 0 < demo.size(adapter) < demo.size(checkpoint)
    assert "  say a\n    " in printed and "expected aaa)" in printed
    assert str(out / "merged") in printed

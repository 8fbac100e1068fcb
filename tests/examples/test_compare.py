"""The comparison's table: every method and column, and figures that agree with what the runs left."""

import contextlib
import dataclasses
import io
import json
import sys

import pytest
import torch
from safetensors.torch import load_file

from esft.checkpoint.load import load_model, load_tokenizer
from examples import compare, demo
from tests.esft.models import chat, save_tiny, write_records

pytest.importorskip("peft", reason="the comparison's LoRA needs the optional package peft")

TEXT = "the quick brown fox jumps over the lazy dog"
METHODS = ["esft", "full", "lora"]


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """Base, folder and output of a comparison on a tiny model for a few steps; its processes are calls here."""
    work = tmp_path_factory.mktemp("compare")
    base, out = save_tiny(work / "base"), work / "out"
    for split, count in {"train": 24, "validation": 8, "test": 10}.items():
        write_records(work / f"{split}.jsonl", count)
    parts = [{"part": "prose", "text": TEXT}, {"part": "instructions", "messages": chat("repeat ab", "ab")}]
    (work / "general.jsonl").write_text("".join(json.dumps(part) + "\n" for part in parts))

    def here(command: list[str], check: bool) -> None:
        assert command[:3] == [sys.executable, "-m", "examples.compare"] and check
        compare.main(command[3:])

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        for module in (demo, compare):
            patch.setattr(module, "MODEL", base)
        patch.setattr(compare, "ESFT", dataclasses.replace(demo.ESFT, steps=4, batch_size=8))
        patch.setattr(compare.subprocess, "run", here)
        compare.main(["--data", str(work), "--general", str(work / "general.jsonl"), "--out", str(out)])
    return base, out, printed.getvalue().splitlines()


def test_the_table_has_every_method_and_column(compared):
    _, _, printed = compared
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in printed if line.startswith("|")]
    names = "method,exact match,prose,instructions,trained,share,stored MB,peak MB,seconds".split(",")
    assert cells[0] == names
    assert [row[0] for row in cells[2:]] == ["base", *METHODS]
    assert all(row[names.index("trained") :] == [""] * 5 for row in cells[2:3])
    assert all(all(row) for row in cells[3:])
    rows = json.loads(printed[-1])
    assert [list(row.values())[:2] for row in rows] == [row[:2] for row in cells[2:]]


def test_parameters_and_bytes_are_those_of_the_files(compared):
    base, out, printed = compared
    rows = {row["method"]: row for row in json.loads(printed[-1])}
    total = sum(tensor.numel() for tensor in load_file(base / "model.safetensors").values())
    left = {
        "esft": out / "esft" / "adapter" / "adapter.safetensors",
        "full": out / "full" / "model" / "model.safetensors",
        "lora": out / "lora" / "adapter" / "adapter_model.safetensors",
    }
    for method, file in left.items():
        trained = sum(tensor.numel() for tensor in load_file(file).values())
        assert rows[method]["trained"] == trained
        assert rows[method]["share"] == f"{trained / total:.1%}"
        assert rows[method]["stored MB"] == f"{file.stat().st_size / 1e6:.1f}"
    assert rows["esft"]["trained"] < rows["full"]["trained"] == total


def test_losses_are_per_token_with_their_rise_above_the_bases(compared):
    base, out, printed = compared
    rows = {row["method"]: row for row in json.loads(printed[-1])}
    tokenizer = load_tokenizer(str(base))
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(TEXT)["input_ids"]]])
    for method, folder in {"base": base, "full": out / "full" / "model"}.items():
        loss = load_model(str(folder))(ids, labels=ids).loss.item()
        assert float(str(rows[method]["prose"]).split()[0]) == pytest.approx(loss, abs=2e-3)
    for method in METHODS:
        for part in ("prose", "instructions"):
            after, rise = rows[method][part].split()
            assert float(after) - rows["base"][part] == pytest.approx(float(rise.strip("(+)")), abs=2e-3)
            assert float(rise.strip("(+)")) != 0

"""No stage replaces a file that it has not written, whatever an output is called."""

import os
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

import esft
from esft.checkpoint.load import load_model
from esft.cli.parser import main
from esft.selection import ExpertSelection
from tests.esft.checkpoint.files import WEIGHTS
from tests.esft.models import save_tiny, write_records

FOREIGN = [
    ("score --model base --data g.jsonl --out g.jsonl --overwrite", "would replace g.jsonl, which is read"),
    ("score --model base --data g.jsonl --out hard.jsonl --overwrite", "would replace g.jsonl, which is read"),
    ("score --model base --data g.jsonl --out soft.jsonl --overwrite", "would replace g.jsonl, which is read"),
    ("score --model base --data g.jsonl --out d.jsonl --overwrite", "d.jsonl: holds something else, and is not"),
    ("score --model base --data g.jsonl --out base/model.safetensors --overwrite", "lies in base, which is read"),
    ("score --model base --data g.jsonl --out base/config.json --overwrite", "lies in base, which is read"),
    ("score --model base --data g.jsonl --out base/new.json", "lies in base, which is read"),
    ("score --model base --data g.jsonl --out adapter/adapter.safetensors --overwrite", "holds something else"),
    ("score --model base --data g.jsonl --out e.json --overwrite", "e.json: holds something else"),
    ("select --scores s.json --out s.json --overwrite", "would replace s.json, which is read"),
    ("select --scores s.json --out x.png --plot x.png", "would replace x.png, which is read"),
    (
        "select --scores s.json --out photo.png --plot ./photo.png --overwrite",
        "would replace ./photo.png, which is read",
    ),
    ("select --scores s.json --out d.jsonl --overwrite", "d.jsonl: holds something else"),
    ("select --scores s.json --out base/config.json --overwrite", "base/config.json: holds something else"),
    ("select --scores s.json --out adapter/expert_cfg.json --overwrite", "lies beside adapter.safetensors, may be a"),
    ("select --scores s.json --out run/experts.json --overwrite", "lies beside esft_run.json, may be a part of the"),
    ("select --scores s.json --out new.json --plot photo.png --overwrite", "photo.png: holds something else"),
    ("select --scores s.json --out new.json --plot s.json --overwrite", "must end in .png, .pdf or .svg, got 's.json'"),
    ("eval --model base --data g.jsonl --out g.jsonl --overwrite", "would replace g.jsonl, which is read"),
    ("eval --model base --data g.jsonl --out s.json --overwrite", "s.json: holds something else"),
    ("eval --model base --adapter adapter --data g.jsonl --out adapter/x.json", "lies in adapter, which is read"),
    *(
        (f"{command} new.png/{end}", f"new.png/{end}")
        for command in (
            "score --model base --data g.jsonl --out",
            "eval --model base --data g.jsonl --out",
            "select --scores s.json --out",
            "select --scores s.json --out new.json --plot",
            "report run --html",
            "compare run other --html",
        )
        for end in ("", ".")
    ),
    ("train --model base --data g.jsonl --method full --out thesis --overwrite", "thesis: holds no run"),
    ("train --model base --data g.jsonl --method full --out base --overwrite", "would replace base, which is read"),
    ("train --model base --data thesis/g.jsonl --method full --out thesis --overwrite", "would replace thesis/g.jsonl"),
    ("train --model base --data thesis --method full --out thesis/run", "thesis/run: lies in thesis, which is read"),
    ("train --model base --data thesis --method full --out thesis/run --resume", "lies in thesis, which is read"),
    ("train --model base --data thesis@train:2 --method full --out thesis/a/run --overwrite", "lies in thesis, which"),
    ("train --model base --data g.jsonl --mix thesis:0.1 --method full --out thesis/run", "lies in thesis, which is"),
    ("train --model base --data g.jsonl --eval-data a=thesis --method full --out loop/run", "lies in thesis, which is"),
    ("train --model base --data loop --method full --out thesis/run", "lies in loop, which is read"),
    ("score --model base --data thesis --out thesis/s.json", "thesis/s.json: lies in thesis, which is read"),
    ("eval --model base --data thesis --out thesis/run/s.json", "thesis/run is not a folder"),
    ("eval --model base --data thesis --out loop/s.json", "lies in thesis, which is read"),
    ("train --model base --data run/c.yaml --method full --out run --resume", "would replace run/c.yaml, which is"),
    ("train --model run --data g.jsonl --method full --out run --resume", "would replace run, which is read"),
    ("merge --model base --adapter adapter --out . --overwrite", "would replace base, which is read"),
    (
        "train --model base --data g.jsonl --config run/c.yaml --experts e.json --out run --overwrite",
        "run/c.yaml, wh",
    ),
    (
        "train --model base --data g.jsonl --experts run/experts.json --out run --overwrite",
        "run/experts.json, wh",
    ),
    ("merge --model base --adapter adapter --out thesis --overwrite", "thesis: holds no earlier merge"),
    ("merge --model base --adapter adapter --out base --overwrite", "would replace base, which is read"),
    ("merge --model base --adapter adapter --out adapter --overwrite", "would replace adapter, which is read"),
]


@pytest.fixture
def precious(tmp_path, monkeypatch):
    """Files of every kind, some of them a user's own."""
    monkeypatch.chdir(tmp_path)
    for folder, names, text in (
        ("base", ("model.safetensors", "config.json"), '{"model_type": "some"}'),
        ("adapter", ("adapter.safetensors", "expert_cfg.json"), "weights"),
        ("thesis", ("config.yaml", "chapter.tex", "g.jsonl"), "years of work"),
        ("run", ("c.yaml", "experts.json", "esft_run.json"), '{"experts": {}}'),
    ):
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / name).write_text('{"experts": {}}' if name == "expert_cfg.json" else text)
    for name in ("d.jsonl", "g.jsonl"):
        write_records(tmp_path / name)
    os.link("g.jsonl", "hard.jsonl")
    (tmp_path / "loop").symlink_to("thesis")
    (tmp_path / "soft.jsonl").symlink_to("g.jsonl")
    esft.ExpertScores({1: {0: 1.0}}, {1: {0: 1.0}}).save("s.json")
    esft.selection.ExpertSelection({1: [0]}).save("e.json")
    (tmp_path / "photo.png").write_bytes(b"\x89PNG\r\n of a holiday")
    return tmp_path


@pytest.mark.parametrize(("text", "message"), FOREIGN)
def test_a_users_file_is_never_the_price_of_an_output(precious, capsys, text: str, message: str):
    def found() -> dict:
        return {path: path.read_bytes() if path.is_file() else None for path in precious.rglob("*")}

    before = found()
    try:
        assert main(text.split()) == 2
    except SystemExit as ended:  # of an argument that is wrong by itself
        assert ended.code == 2
    line = capsys.readouterr().err
    assert message in line and line.count("\n") == 1
    assert found() == before


def test_outputs_of_their_kind_are_replaced_where_one_says_so(precious, capsys):
    for _ in range(2):
        assert main("select --scores s.json --out e.json --plot p.png --overwrite".split()) == 0, (
            capsys.readouterr().err
        )
    assert (precious / "p.png").read_bytes().startswith(b"\x89PNG")


def test_an_adapter_of_which_rounding_leaves_nothing_is_told_of(tmp_path):
    base = save_tiny(tmp_path / "base", dtype=torch.bfloat16)
    model = esft.swap(load_model(str(base), "bfloat16"), ExpertSelection({1: [0]}))
    esft.save_adapter(model, tmp_path / "a")
    with pytest.warns(UserWarning, match="/a: changes nothing: in the dtype of .*/base its values are the base's$"):
        esft.merge(base, tmp_path / "a", tmp_path / "same")
    assert (tmp_path / "same" / WEIGHTS).read_bytes() == (base / WEIGHTS).read_bytes()
    tensors = load_file(tmp_path / "a" / "adapter.safetensors")
    next(iter(tensors.values())).view(-1)[:1].add_(1)
    save_file(tensors, tmp_path / "a" / "adapter.safetensors", {"format": "pt"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        esft.merge(base, tmp_path / "a", tmp_path / "other")
    assert (tmp_path / "other" / WEIGHTS).read_bytes() != (base / WEIGHTS).read_bytes()

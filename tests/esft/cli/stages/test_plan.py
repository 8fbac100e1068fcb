"""What ``esft plan`` hands to the Python calls that it covers, and what it prints and writes."""

import json

import pytest
import torch

import esft
from esft.cli.parser import main
from esft.cli.stages import plan
from esft.planning import advice as advising
from esft.planning import outline as outlines
from esft.planning import plan as planning
from esft.runs.config import TrainConfig
from esft.selection import ExpertSelection
from tests.esft.cli.conftest import NO_COUNTS, refused, usage, values
from tests.esft.models import save_tiny


def test_plan_prints_what_fits_what_to_change_and_json(tmp_path, capsys):
    model = save_tiny(tmp_path / "base", dtype=torch.bfloat16)
    (model / "model.safetensors").unlink()
    ExpertSelection({1: [2, 7], 2: [0]}).save(tmp_path / "e.json")
    usual = ["plan", "--model", str(model), "--tokens", "64", "--experts", str(tmp_path / "e.json")]
    assert main([*usual, "--memory-gb", "16"]) == 0
    shown = capsys.readouterr().out
    assert "Computed, not measured: esft, 64 tokens in 1 records" in shown and "Fits 16 GB." in shown
    assert main([*usual, "--memory-gb", "0.001"]) == 0
    assert "Does not fit 0.001 GB; nor with any setting" in capsys.readouterr().out
    assert main([*usual, "--frozen", "all", "--optimizer", "adamw_8bit", "--batch-size", "4", "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["frozen"] for line in lines] == ["bf16", "int8", "nf4", "nf4_double", "fp8", "mxfp4"]
    assert all((line["optimizer"], line["records"], line["tokens"]) == ("adamw_8bit", 4, 64) for line in lines)
    config = TrainConfig(batch_size=4, optimizer="adamw_8bit")
    assert lines[2] == vars(
        esft.plan(str(model), ExpertSelection.load(tmp_path / "e.json"), config, frozen="nf4", tokens=64)
    )
    assert main([*usual, "--memory-gb", "16", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["fits"] is True


def test_plan_says_what_to_shard_over_several_gpus(tmp_path, capsys):
    usual = ["plan", "--model", str(save_tiny(tmp_path / "base")), "--tokens", "64", "--gpus", "2"]
    assert main([*usual, "--memory-gb", "16"]) == 0
    nothing, frozen, experts, both, advice = capsys.readouterr().out.splitlines()[-5:]
    assert nothing.startswith("2 GPUs, sharded nothing: ") and advice.startswith("Shard nothing: ")
    assert main(usual) == 0
    assert capsys.readouterr().out.splitlines()[-3:] == [frozen, experts, both]
    assert main([*usual, "--json"]) == 0
    ways = json.loads(capsys.readouterr().out)["gpus"]
    assert [way["sharded"] for way in ways] == [
        "nothing", "what is frozen", "the experts", "the experts and what else is frozen",
    ]  # fmt: skip


@pytest.mark.parametrize(("flag", "trusted"), [([], False), (["--trust-remote-code"], True)])
def test_plan_runs_a_models_code_only_where_it_is_told(tmp_path, monkeypatch, flag: list[str], trusted: bool):
    asked, real = [], planning.plan

    def watched(*given, trust_remote_code: bool, **named):
        asked.append(trust_remote_code)
        return real(*given, **named)

    monkeypatch.setattr(planning, "plan", watched)
    assert main(["plan", "--model", str(save_tiny(tmp_path / "base")), "--tokens", "64", *flag]) == 0
    assert asked == [trusted]


def test_what_to_change_and_to_shard_is_asked_of_what_was_planned(tmp_path, monkeypatch, capsys):
    asked, real = [], outlines.outline
    monkeypatch.setattr(advising, "advice", lambda planned, *given: asked.append(given) or ["--less"])
    monkeypatch.setattr(outlines, "outline", lambda path, *given: asked.append(given) or real(path, *given))
    usual = ["plan", "--model", str(save_tiny(tmp_path / "base")), "--tokens", "64", "--dtype", "float32"]
    assert main([*usual, "--memory-gb", "0.5", "--gpus", "2", "--trust-remote-code"]) == 0
    config = TrainConfig(batch_size=1, dtype="float32")
    assert asked == [(config, "bf16", 64, 0.5e9), ("float32", True)]  # auto is bf16 by then
    assert "Does not fit 0.5 GB; it does with --less." in capsys.readouterr().out


def test_plan_names_what_is_wrong(tmp_path, capsys):
    model = save_tiny(tmp_path / "base")
    for more, message in (
        (["--frozen", "nf4", "--method", "lora"], "frozen nf4 goes with the method esft, not with lora"),
        (["--experts-per-layer", "9"], "9 experts a layer: the model's layers have 8"),
        (["--experts", str(tmp_path / "no.json")], "no.json"),
        (["--experts", ""], "'': is no path"),
        (["--tokens", "3", "--batch-size", "4"], "3 tokens cannot be those of 4 records"),
    ):
        assert main(["plan", "--model", str(model), *more]) == 2
        assert message in capsys.readouterr().err
    for more in (["--memory-gb", "0"], ["--memory-gb", "x"], ["--tokens", "0"], ["--top-p", "2"], ["--frozen", "x"]):
        with pytest.raises(SystemExit):
            main(["plan", "--model", str(model), *more])
        assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    ("said", "records"),
    [("", 1), ("--micro-batch-size 4", 4), ("--batch-size 8", 8), ("--batch-size 8 --micro-batch-size 2", 2)],
)
def test_as_many_records_are_planned_with_as_one_says_and_one_where_nothing_is_said(
    tmp_path, capsys, said: str, records: int
):
    model = save_tiny(tmp_path / "base")
    assert main(["plan", "--model", str(model), "--tokens", "64", "--json", *said.split()]) == 0
    assert json.loads(capsys.readouterr().out)["records"] == records
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    assert "(default that of a micro batch, else 1)" in " ".join(capsys.readouterr().out.split())


def test_plan_is_called_like_this(monkeypatch):
    assert usage(monkeypatch, plan) == (
        "--model MODEL [--experts EXPERTS | --top-p TOP_P | --experts-per-layer N] [--tokens TOKENS] "
        "[--frozen {auto,bf16,int8,nf4,nf4_double,fp8,mxfp4,all}] [--memory-gb GB] [--gpus N] [--json] "
        "[--method {esft,full,lora}] [--batch-size X] [--micro-batch-size X] [--optimizer {adamw,adamw_8bit}] "
        "[--kl-weight X] [--lora-rank X] [--dtype {auto,bfloat16,float32}] [--frozen-linear {bf16,int8,nf4}] "
        "[--recompute {none,frozen,layers}] [--trust-remote-code]"
    )
    settings = "method optimizer recompute batch_size micro_batch_size lora_rank dtype frozen_linear kl_weight".split()
    assert values(monkeypatch, "plan --model m") == {
        **dict.fromkeys(settings), "model": "m", "experts": None, "top_p": 0.2,
        "experts_per_layer": None, "tokens": 2048, "frozen": "auto", "memory_gb": None, "gpus": None, "json": False,
        "trust_remote_code": False,
    }  # fmt: skip


@pytest.mark.parametrize("value", NO_COUNTS)
@pytest.mark.parametrize("option", ["--experts-per-layer", "--tokens", "--gpus", "--memory-gb"])
def test_a_number_that_is_none_is_refused_with_its_option(capsys, option: str, value: str):
    assert f"argument {option}: " in refused(capsys, f"plan --model m {option} {value}")

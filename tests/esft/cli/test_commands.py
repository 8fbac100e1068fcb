"""What each stage hands to the Python call that it covers, and what it prints and writes of the outcome."""

import importlib
import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import PreTrainedConfig

import esft
from esft.cli.parser import main
from esft.data.records import Record
from esft.data.sources import read_records
from esft.runs.config import TrainConfig
from esft.selection import ExpertSelection
from esft.storage.files import write_yaml
from tests.esft.models import save_tiny, tiny_tokenizer, write_records

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
    "mean_loss": "esft.evaluation.loss",
    "exact_match": "esft.evaluation.scores",
    "answer": "esft.evaluation.answers",
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


def test_score_loads_the_model_and_scores_windows_of_the_data(work, calls, capsys):
    scores = esft.ExpertScores({1: {0: 1.0}, 2: {0: 1.0}}, {1: {0: 1.0}, 2: {0: 1.0}})
    calls.watch("score_experts", scores)
    calls.watch("windows", "batches")
    stage(
        "score --model m --data d.jsonl --out s.json --max-length 30 --batch-size 2 --max-tokens 77 --dtype float32 "
        "--backend reference --frozen nf4 --frozen-linear int8"
    )
    assert calls.of["load_with_adapter"] == [(("m", None, "nf4", "float32", "reference", False, True, "int8"), {})]
    assert calls.of["load_tokenizer"] == calls.of["open_config"] == [(("m", False), {})]
    (((examples, length, batch_size), _),) = calls.of["windows"]
    assert (len(examples), length, batch_size) == (6, 30, 2)
    assert calls.of["score_experts"] == [(("a model", "batches", 77), {"progress": True})]
    assert esft.ExpertScores.load("s.json") == scores
    assert capsys.readouterr().out == "scores of 2 layers in s.json\n"


def adapter(work) -> None:
    (work / "a").mkdir()
    ExpertSelection({1: [0]}).save(work / "a" / "expert_cfg.json")


@pytest.fixture
def scored(work):
    token = {1: {0: 0.6, 1: 0.4}, 2: {0: 0.1, 1: 0.9}}
    gate = {1: {0: 0.2, 1: 0.8}, 2: {0: 0.7, 1: 0.3}}
    esft.ExpertScores(token, gate).save(work / "s.json")
    return work


@pytest.mark.parametrize(
    ("more", "experts", "flags"),
    [
        ("", {1: [0], 2: [1]}, (False, False)),
        ("--by gate", {1: [1], 2: [0]}, (False, False)),
        ("--top-p 0.7 --shared-experts", {1: [0, 1], 2: [1]}, (True, False)),
        ("--non-expert-modules", {1: [0], 2: [1]}, (False, True)),
    ],
)
def test_select_writes_and_prints_the_choice(scored, capsys, more: str, experts: dict, flags: tuple):
    stage(f"select --scores s.json --out e.json {more}")
    chosen = ExpertSelection.load("e.json")
    assert (chosen.experts, (chosen.shared_experts, chosen.non_expert_modules)) == (experts, flags)
    count = sum(map(len, experts.values()))
    lines = [f"layer {layer}: {ids}" for layer, ids in experts.items()]
    assert capsys.readouterr().out.splitlines() == [*lines, f"{count} of 4 experts in e.json"]
    assert main(f"select --scores s.json --out e.json {more}".split()) == 2
    assert "e.json: exists already" in capsys.readouterr().err
    stage(f"select --scores s.json --out e.json --overwrite {more}")


def test_select_draws_what_it_chose_by_and_keeps_a_picture_that_is_there(scored, calls, capsys):
    calls.watch("plot_scores", None)
    stage("select --scores s.json --out e.json --by gate --plot p.png")
    ((arguments, named),) = calls.of["plot_scores"]
    assert arguments == (esft.ExpertScores.load("s.json"), ExpertSelection.load("e.json"), "p.png")
    assert named == {"by": "gate"}
    (scored / "p.png").write_text("")
    assert main("select --scores s.json --out new.json --plot p.png".split()) == 2
    assert "p.png: exists already" in capsys.readouterr().err and not (scored / "new.json").exists()
    stage("select --scores s.json --out new.json --plot p.png --overwrite")


def test_select_holds_the_scores_to_the_model(scored, calls, monkeypatch, capsys):
    put(monkeypatch, "moe_layers", lambda model: [SimpleNamespace(index=1, num_experts=2)])
    assert main("select --scores s.json --out e.json --model m".split()) == 2
    assert "another model" in capsys.readouterr().err
    two = [SimpleNamespace(index=index, num_experts=2, shared_experts=[]) for index in (1, 2)]
    put(monkeypatch, "moe_layers", lambda model: two)
    assert main("select --scores s.json --out e.json --model m --shared-experts".split()) == 2
    assert "selection names shared experts; the model has none" in capsys.readouterr().err
    stage("select --scores s.json --out e.json --model m --trust-remote-code")
    assert calls.of["load_skeleton"][-1] == (("m", True), {})


RESULT = SimpleNamespace(train_loss=1.23456, trained_parameters=12345, stored_bytes=67890, seconds=5.6)


def test_train_hands_over_everything_that_it_is_told(work, calls, capsys):
    calls.watch("train", RESULT)
    ExpertSelection({1: [0]}).save(work / "e.json")
    (work / "c.yaml").write_text("lr: 0.5\nclip: 3.0\n")
    stage(
        "train --model m --data d.jsonl --out run --config c.yaml --experts e.json --eval-data d.jsonl --overwrite "
        "--method esft --lr 0.25 --steps 3 --batch-size 4 --micro-batch-size 2 --max-length 9 --seed 5 --dtype float32 "
        "--backend reference --recompute frozen --warmup-steps 6 --decay 0.5 --quiet"
    )
    config = TrainConfig(
        method="esft", lr=0.25, steps=3, batch_size=4, micro_batch_size=2, max_length=9, seed=5, dtype="float32",
        backend="reference", recompute="frozen", warmup_steps=6, decay=0.5, clip=3.0,
    )  # fmt: skip
    expected = ("m", ["d.jsonl"], "run", config, ExpertSelection({1: [0]}), "d.jsonl", False, True)
    assert calls.of["train"] == [(expected, {"progress": False, "trust_remote_code": False})]
    assert capsys.readouterr().out == ("loss 1.235, 12,345 parameters trained, 67,890 bytes stored, 6 s, run in run\n")


def test_train_takes_several_sources_and_settings_that_are_true_or_false(work, calls):
    calls.watch("train", RESULT)
    more = "--packing --padding-free false --eval-packing true --packing-strategy wrapped --dataset-num-proc 2"
    stage(
        f"train --model m --data d.jsonl:2 --data d.jsonl:1 --out run --method full {more} --assistant-only-loss false"
    )
    (((_, data, _, config, *_), _),) = calls.of["train"]
    assert data == ["d.jsonl:2", "d.jsonl:1"]
    assert config == TrainConfig(
        method="full", packing=True, eval_packing=True, packing_strategy="wrapped", dataset_num_proc=2,
        assistant_only_loss=False,
    )  # fmt: skip


def test_data_prints_the_figures_and_some_records_with_what_is_learnt_marked(work, calls, capsys):
    stage("data d.jsonl --model m --batch-size 2 --show 2 --trust-remote-code")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        "d.jsonl: 6 records, 78 tokens (longest 13), 0 truncated, 0 left out; loss on 30.8% of the tokens; padded, "
        "batches are 81.2% full"
    )
    assert lines[1:] == [
        line for c in "ab" for line in ("", f"<|bos|><|user|>say {c}<|end|><|assistant|>[[{c * 3}<|end|>]]")
    ]
    assert calls.of["load_tokenizer"] == calls.of["open_config"] == [(("m", True), {})]
    (work / "c.yaml").write_text("packing: true\nmax_length: 60\nstreaming: true\nsteps: 3\n")
    stage("data d.jsonl:1 d.jsonl:2 --model m --config c.yaml --batch-size 2 --show 1")
    assert "12 records" in (shown := capsys.readouterr().out) and "packed into rows of 60" in shown
    assert main("data absent.jsonl --model m".split()) == 2
    assert capsys.readouterr().err == "esft: absent.jsonl: No such file or directory\n"


def test_train_leaves_to_the_settings_what_it_is_not_told(work, calls):
    calls.watch("train", RESULT)
    stage("train --model m --data d.jsonl --out run --method full --trust-remote-code")
    expected = ("m", ["d.jsonl"], "run", TrainConfig(method="full"), None, None, False, False)
    assert calls.of["train"] == [(expected, {"progress": True, "trust_remote_code": True})]


@pytest.mark.parametrize(
    ("more", "lr"),
    [("--resume", 0.5), ("--resume --config c.yaml", 0.125), ("--method full", None), ("--resume --lr 0.75", 0.75)],
)
def test_a_run_that_resumes_has_the_settings_that_it_was_begun_with(work, calls, more: str, lr: float | None):
    calls.watch("train", RESULT)
    (work / "run").mkdir()
    write_yaml(work / "run" / "config.yaml", asdict(TrainConfig(lr=0.5)))
    write_yaml(work / "c.yaml", asdict(TrainConfig(lr=0.125)))
    stage(f"train --model m --data d.jsonl --out run {more}")
    (((*_, config, _, _, resume, _), _),) = calls.of["train"]
    assert config.lr == lr and resume == ("--resume" in more)


def test_resuming_where_no_run_is_is_left_to_the_training_to_refuse(work, calls):
    calls.watch("train", RESULT)
    stage("train --model m --data d.jsonl --out run --resume")
    assert calls.of["train"][0][0][3] == TrainConfig()


@pytest.fixture
def measured(work, calls):
    calls.watch("mean_loss", 0.5)
    calls.watch("exact_match", (0.25, [{"given": "a"}]))
    return calls


def test_eval_measures_the_first_records_and_writes_the_answers(work, measured, capsys):
    stage(
        "eval --model m --data d.jsonl --limit 4 --batch-size 3 --max-length 40 --dtype float32 --backend reference "
        "--out o.json"
    )
    result = {"records": 4, "loss": 0.5, "exact_match": 0.25}
    assert json.loads(capsys.readouterr().out) == result
    assert json.loads((work / "o.json").read_text()) == {**result, "answers": [{"given": "a"}]}
    (((model, examples, pad, batch_size), _),) = measured.of["mean_loss"]
    assert (model, len(examples), pad, batch_size) == ("a model", 4, 258, 3)
    (((model, _, records, batch_size, progress), _),) = measured.of["exact_match"]
    assert (model, records, batch_size, progress) == ("a model", read_records("d.jsonl")[:4], 3, True)
    assert measured.of["load_with_adapter"] == [(("m", None, "auto", "float32", "reference", False, True, "bf16"), {})]


def test_eval_can_leave_the_answers_out_and_keeps_a_file_that_is_there(work, measured, capsys):
    stage("eval --model m --data d.jsonl --loss-only --out o.json")
    assert json.loads(capsys.readouterr().out) == {"records": 6, "loss": 0.5}
    assert json.loads((work / "o.json").read_text())["answers"] == []
    assert "exact_match" not in measured.of
    assert main("eval --model m --data d.jsonl --loss-only --out o.json".split()) == 2
    assert "o.json: exists already" in capsys.readouterr().err and len(measured.of["load_with_adapter"]) == 1
    stage("eval --model m --data d.jsonl --quiet --out o.json --overwrite")
    assert measured.of["exact_match"][0][0][-1] is False
    assert measured.of["load_with_adapter"][-1][0][-2:] == (False, "bf16")


def test_eval_cuts_records_as_it_is_told(work, measured, capsys):
    assert main("eval --model m --data d.jsonl --max-length 3".split()) == 2
    assert "d.jsonl: no record has its answer within 3 tokens" in capsys.readouterr().err


def test_generate_loads_an_adapter_and_answers_every_prompt(work, calls, capsys):
    adapter(work)
    calls.watch("answer", ["one", "two"])
    stage("generate --model m --adapter a --prompt x --prompt y --max-new-tokens 7")
    assert calls.of["load_with_adapter"] == [(("m", Path("a"), "auto", "auto", "auto", False, True, "bf16"), {})]
    (((model, _, prompts, longest), _),) = calls.of["answer"]
    assert model == "a model" and longest == 7
    assert prompts == [Record([{"role": "user", "content": text}]) for text in "xy"]
    assert capsys.readouterr().out == "x\n    one\ny\n    two\n"


def test_merge_and_report_hand_over_and_print(work, calls, capsys):
    adapter(work)
    calls.watch("merge", "there")
    calls.watch("report", "a table")
    stage("merge --model m --adapter a --out o")
    stage("merge --model m --adapter a --out o --overwrite")
    stage("report run")
    folder = Path("a")
    assert calls.of["merge"] == [(("m", folder, "o", False, False), {}), (("m", folder, "o", True, False), {})]
    assert calls.of["report"] == [(("run",), {})]
    assert capsys.readouterr().out.splitlines() == ["merged checkpoint in there"] * 2 + ["a table"]


def test_score_keeps_a_file_that_is_there_and_replaces_it_where_it_is_told(work, calls, capsys):
    calls.watch("score_experts", esft.ExpertScores({1: {0: 1.0}}, {1: {0: 1.0}}))
    esft.ExpertScores({1: {0: 0.5, 1: 0.5}}, {1: {0: 0.5, 1: 0.5}}).save(work / "s.json")
    assert main("score --model m --data d.jsonl --out s.json".split()) == 2
    assert "s.json: exists already" in capsys.readouterr().err and "load_with_adapter" not in calls.of
    stage("score --model m --data d.jsonl --out s.json --overwrite")
    assert esft.ExpertScores.load("s.json").token_scores == {1: {0: 1.0}}


def test_a_loss_that_is_no_number_is_an_error_and_no_json(work, calls, capsys):
    calls.watch("mean_loss", float("nan"))
    assert main("eval --model m --data d.jsonl --loss-only --out o.json".split()) == 2
    printed = capsys.readouterr()
    assert printed.err == "esft: m: loss on d.jsonl is nan: weights hold what is no number, or too much\n"
    assert printed.out == "" and not (work / "o.json").exists()


def test_a_prompt_that_is_too_long_is_refused_before_the_model_is_loaded(work, calls, capsys):
    for options, message in (
        ("--max-length 4", "prompt 1: has 11 tokens, more than --max-length 4"),
        ("--max-length 257", "--max-length 257 is beyond the model's 256 positions"),
        ("--prompt " + "x" * 1000, "prompt 2: has 1004 tokens, more than --max-length 256"),
    ):
        assert main(f"generate --model m --prompt hello-y {options}".split()) == 2
        assert capsys.readouterr().err == f"esft: {message}\n"
    assert "load_with_adapter" not in calls.of


def test_a_model_is_trusted_only_where_that_is_said(work, calls):
    calls.watch("answer", ["one"])
    for flag, trusted in (("", False), ("--trust-remote-code", True)):
        stage(f"generate --model m --prompt x {flag}")
        assert calls.of["load_with_adapter"][-1][0][-3:] == (trusted, True, "bf16")
        assert calls.of["load_tokenizer"][-1] == calls.of["open_config"][-1] == (("m", trusted), {})


def test_esft_without_a_selection_says_which_flag_is_missing(work, calls, capsys):
    calls.watch("train", RESULT)
    assert main("train --model m --data d.jsonl --out run".split()) == 2
    assert capsys.readouterr().err == "esft: --method esft needs an expert selection: --experts\n"
    assert "train" not in calls.of


def test_an_adapter_that_is_not_there_is_told_before_a_model_is_loaded(work, calls, capsys):
    for text in ("eval --model m --data d.jsonl", "generate --model m --prompt x", "merge --model m --out o"):
        assert main([*text.split(), "--adapter", "absent"]) == 2
        assert capsys.readouterr().err == "esft: absent: not an adapter folder (no expert_cfg.json)\n"
    assert not calls.of


@pytest.mark.parametrize("stage_of", ["score --out o", "train --method full --out o", "eval"])
def test_data_that_is_not_there_is_told_before_a_model_is_loaded(work, calls, capsys, stage_of: str):
    assert main(f"{stage_of} --model m --data absent.jsonl".split()) == 2
    assert capsys.readouterr().err == "esft: absent.jsonl: No such file or directory\n"
    assert not calls.of


def test_what_is_printed_holds_no_control_characters(work, calls, capsys):
    calls.watch("answer", ["a\x1b[2Jb\nc\u202ed"])
    stage("generate --model m --prompt x")
    assert capsys.readouterr().out == "x\n    a\\x1b[2Jb\nc\\u202ed\n"


def test_scores_of_a_real_model_add_up(work):
    save_tiny(work / "base")
    stage("score --model base --data d.jsonl --out s.json --max-length 64")
    scores = esft.ExpertScores.load("s.json")
    assert list(scores.token_scores) == [1, 2]
    for layer in scores.token_scores.values():
        assert sum(layer.values()) == pytest.approx(1, abs=1e-3)
    assert torch.is_grad_enabled()


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


def test_plan_names_what_is_wrong(tmp_path, capsys):
    model = save_tiny(tmp_path / "base")
    for more, message in (
        (["--frozen", "nf4", "--method", "lora"], "frozen nf4 goes with the method esft, not with lora"),
        (["--experts-per-layer", "9"], "9 experts a layer: the model's layers have 8"),
        (["--experts", str(tmp_path / "no.json")], "no.json"),
        (["--tokens", "3", "--batch-size", "4"], "3 tokens cannot be those of 4 records"),
    ):
        assert main(["plan", "--model", str(model), *more]) == 2
        assert message in capsys.readouterr().err
    for more in (["--memory-gb", "0"], ["--memory-gb", "x"], ["--tokens", "0"], ["--top-p", "2"], ["--frozen", "x"]):
        with pytest.raises(SystemExit):
            main(["plan", "--model", str(model), *more])
        assert len(capsys.readouterr().err.splitlines()) == 1

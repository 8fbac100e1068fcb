"""The command, stage after stage on a model built here, and its one-line errors."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import esft
from esft.adapters.load_any import load_any_adapter
from esft.checkpoint.load import load_model
from esft.cli import parser as command
from esft.cli.parser import main
from esft.errors import Interrupted
from tests.esft.models import save_tiny, tiny_tokenizer, token_batch, write_records
from tests.esft.processes import started, status


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
        ("score --model base --data d.jsonl --out d.jsonl/s.json", "is not a folder"),
        ("score --model base --data d.jsonl --out base --overwrite", "base: is a folder"),
        ("score --model base --data broken.jsonl --out s.json", "broken.jsonl: line 2: not JSON"),
        ("score --model base --data question.jsonl --out s.json", "question.jsonl: line 1: no assistant turn"),
        ("score --model dense --data d.jsonl --out s.json", "no MoE layers"),
        ("select --scores nan.json --out e.json", "nan.json: NaN is no JSON number"),
        ("select --scores none.json --out e.json", "no token scores"),
        ("select --scores strange.json --model base --out e.json", "no score of expert 0, but of expert 9"),
        ("select --scores other.json --out e.json --plot no/such/x.png", "no/such"),
        ("train --model base --data d.jsonl --experts nothing.json --out run", "selection is empty"),
        ("train --model base --data d.jsonl --out . --method full --overwrite", "would replace"),
        ("train --model base --data d.jsonl --out d.jsonl/run --method full", "is not a folder"),
        ("merge --model other_base --adapter adapter --out m", "made from another base"),
        ("score --model absent --data d.jsonl --out s.json", "absent: no such folder"),
        ("score --model base --data empty.jsonl --out s.json", "empty.jsonl: holds no records"),
        ("select --scores d.jsonl --out e.json", "d.jsonl: line 2: not JSON"),
        ("select --scores other.json --model base --out e.json", "score file is of another model"),
        ("train --model base --data d.jsonl --out run", "--method esft needs an expert selection: --experts"),
        ("train --model base --data d.jsonl --experts wrong.json --out run", "selection names layer 7"),
        ("train --model base --data d.jsonl --out base --method full", "would replace base"),
        ("train --model base --data d.jsonl --out run --method full --steps 0", "--steps must be in [1, inf), got 0"),
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
    (work / "nothing.json").write_text('{"experts": {"1": []}}')
    (work / "nan.json").write_text('{"token_scores": {"1": {"0": NaN}}, "gate_scores": {}}')
    (work / "none.json").write_text('{"token_scores": {}, "gate_scores": {}}')
    strange = json.dumps({layer: {str(e + 2): 0.125 for e in range(8)} for layer in ("1", "2")})
    (work / "strange.json").write_text(f'{{"token_scores": {strange}, "gate_scores": {strange}}}')
    good = (work / "d.jsonl").read_text()
    (work / "broken.jsonl").write_text(good.splitlines()[0] + "\n{\n")
    (work / "question.jsonl").write_text('{"messages": [{"role": "user", "content": "say a"}]}\n')
    if "adapter" in stage:
        save_tiny(work / "other_base", seed=1)
        esft.save_adapter(esft.swap(load_model("base"), esft.ExpertSelection({1: [0]})), "adapter")
    if "dense" in stage:
        config = AutoConfig.for_model(
            "llama", vocab_size=300, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=2,
        )  # fmt: skip
        AutoModelForCausalLM.from_config(config).save_pretrained("dense")
        tiny_tokenizer().save_pretrained("dense")
    capsys.readouterr()
    before = sorted(work.rglob("*"))
    assert main(stage.split()) == 2
    captured = capsys.readouterr()
    lines = [
        line for line in captured.err.splitlines() if line.strip() and "Loading weights" not in line
    ]  # transformers' progress bar
    assert len(lines) == 1 and lines[0].startswith("esft: ") and message in lines[0]
    assert sorted(work.rglob("*")) == before


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ("select --scores s.json --out e.json --top-p x", "--top-p: invalid number value: 'x'"),
        ("select --scores s.json --out e.json --top-p 1.5", "--top-p: must be in (0, 1], got 1.5"),
        ("select --scores s.json --out e.json --top-p nan", "--top-p: must be in (0, 1], got nan"),
        ("select --scores s.json --out e.json --plot x.xyz", "--plot: must end in .png, .pdf or .svg, got 'x.xyz'"),
        ("eval --model base --data d.jsonl --batch-size 0", "must be at least 1, got 0"),
        ("eval --model base --data d.jsonl --limit -7", "must be at least 1, got -7"),
        ("generate --model base --prompt a --max-new-tokens many", "invalid whole number value: 'many'"),
    ],
)
def test_bad_arguments_are_one_clear_line(capsys, stage: str, message: str):
    with pytest.raises(SystemExit, match="2"):
        main(stage.split())
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_a_run_resumes_with_the_settings_it_was_begun_with(work, capsys):
    (work / "experts.json").write_text('{"experts": {"1": [0]}}')
    (work / "others.json").write_text('{"experts": {"1": [1]}}')
    save_tiny(work / "other_base", seed=1)
    write_records(work / "other.jsonl", 16)
    begin = (
        "train --model base --data d.jsonl --out run --experts experts.json --lr 1e-3 --batch-size 8 --steps 2 --quiet"
    )
    assert main(begin.split()) == 0
    assert main("train --model base --data d.jsonl --out run --resume --steps 4 --quiet".split()) == 0
    rates = [json.loads(line)["lr"] for line in (work / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rates == [1e-3] * 4
    before = {path: path.read_bytes() for path in (work / "run").rglob("*") if path.is_file()}
    capsys.readouterr()
    for change, message in {
        "--lr 1e-4": "cannot resume with lr 0.0001: the run was begun with 0.001",
        "--method full": "cannot resume with method full",
        "--experts others.json": "cannot resume with another expert selection",
        "--model other_base": "cannot resume with model other_base",
        "--data other.jsonl": "cannot resume with data d.jsonl, other.jsonl",
    }.items():
        stage = f"train --model base --data d.jsonl --out run --resume --quiet {change}"
        assert main(stage.split()) == 2
        assert message in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (work / "run").rglob("*") if path.is_file()} == before


def test_no_stage_and_no_run_are_refused(capsys):
    for arguments, missing in (([], "stage"), (["report"], "run")):
        with pytest.raises(SystemExit, match="2"):
            main(arguments)
        assert f"the following arguments are required: {missing}" in capsys.readouterr().err


def test_an_error_of_another_library_is_one_line_too(monkeypatch, capsys):
    def stage(_):
        raise RuntimeError("a\x1bb\nand here is why")

    monkeypatch.setattr(command, "run_stage", stage)
    assert main(["report", "r"]) == 2
    assert capsys.readouterr().err == "esft: RuntimeError: a\\x1bb (ESFT_DEBUG=1 shows where)\n"


def test_who_reads_the_output_may_stop(monkeypatch, capfd):
    def stage(_):
        raise BrokenPipeError

    monkeypatch.setattr(command, "run_stage", stage)
    monkeypatch.setattr(command.os, "dup2", lambda new, old: None)
    assert main(["report", "r"]) == 141
    assert capfd.readouterr().err == ""


def test_who_reads_a_commands_help_may_stop_too(monkeypatch):
    def closed(*_, **__):
        raise BrokenPipeError

    monkeypatch.setattr(command, "put", closed)
    monkeypatch.setattr(command.os, "dup2", lambda new, old: None)
    assert main(["--help"]) == 141


def test_the_arguments_are_seen_before_a_job_is_joined(monkeypatch):
    done = []

    @contextmanager
    def job(args):
        done.append("joined")
        yield True

    monkeypatch.setattr(command, "job", job)
    monkeypatch.setattr(command, "run_stage", lambda args: done.append("run"))
    assert main(["report", "r"], lambda args: done.append(args.run)) == 0
    assert done == ["r", "joined", "run"]


def test_a_full_disk_behind_the_output_is_one_line(monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys.stdout, "write", full)
    assert main(["train", "--help-config"]) == 2
    assert capsys.readouterr().err == "esft: standard output: No space left on device\n"


LIGHT = """
import sys
from esft.cli.parser import main
try:
    status = main({arguments!r})
except SystemExit as ended:
    status = ended.code
heavy = sorted(name for name in ("torch", "transformers", "matplotlib", "numpy", "peft") if name in sys.modules)
print(status, heavy, file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["--help"], 0),
        *(
            ([name, "--help"], 0)
            for name in ("score", "select", "plan", "train", "eval", "generate", "merge", "report", "compare")
        ),
        (["train", "--help-config"], 0),
        (["score", "--model", "m", "--data", "d", "--out", "o", "--batch-size", "0"], 2),
        (["score", "--model", "m", "--data", "absent", "--out", "o", "--quiet"], 2),
        (["train", "--model", "m", "--data", "d", "--out", "o", "--lr", "x"], 2),
        (["train", "--model", "m", "--data", "d", "--out", "o", "--config", "absent.yaml"], 2),
        (["train", "--model", "m", "--data", "d", "--out", "o", "--experts", "absent.json"], 2),
        (["select", "--scores", "absent.json", "--out", "o"], 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_help_and_bad_arguments_wait_for_no_heavy_import(tmp_path, arguments: list[str], status: int):
    done = subprocess.run(
        [sys.executable, "-c", LIGHT.format(arguments=arguments)], capture_output=True, text=True, timeout=60,
        env=os.environ | {"PYTHONPATH": str(Path(esft.__file__).parents[1])}, cwd=tmp_path,
    )  # fmt: skip
    assert done.stderr.splitlines()[-1] == f"{status} []"


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (KeyboardInterrupt(), 130, "esft: interrupted"),
        (Interrupted("terminated", 15), 143, "esft: terminated"),
        (Interrupted("run: stopped", 2, resumable=True), 130, "esft: run: stopped; go on with: esft report r --resume"),
        (
            Interrupted("run: stopped", 15, resumable=True),
            143,
            "esft: run: stopped; go on with: esft report r --resume",
        ),
    ],
)
def test_a_signal_ends_a_stage_with_one_line_and_the_status_of_a_shell(monkeypatch, capsys, error, status, line: str):
    def stage(_):
        raise error

    monkeypatch.setattr(command, "run_stage", stage)
    monkeypatch.setattr(sys, "argv", ["/bin/esft"])
    assert main(["report", "r"]) == status
    assert capsys.readouterr().err == line + "\n"


def test_the_script_turns_sigterm_into_an_interruption(monkeypatch):
    told = {}
    monkeypatch.setattr(command.signal, "signal", told.__setitem__)
    monkeypatch.setattr(command, "main", lambda **_: 7)
    with pytest.raises(SystemExit, match="7"):
        command.entry()
    with pytest.raises(Interrupted, match="terminated") as raised:
        told[signal.SIGTERM](signal.SIGTERM, None)
    assert told.keys() == {signal.SIGTERM} and raised.value.signal == signal.SIGTERM


def test_the_script_settles_its_memory_for_the_stage_and_ends_with_its_status(monkeypatch, capsys):
    done = []
    monkeypatch.setattr(command, "settle_memory", lambda args: done.append((args.stage, args.run)))
    monkeypatch.setattr(sys, "argv", ["esft", "report", "no/such/run"])
    monkeypatch.setattr(command.signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as ended:
        command.entry()
    assert ended.value.code == 2 and done == [("report", "no/such/run")]
    assert "no/such/run: not a run folder" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_training_that_is_told_to_stop_says_the_command_that_goes_on_and_it_does(work, number: int):
    (work / "e.json").write_text('{"experts": {"1": [2]}}')
    # With a space in a name, and far more steps than there is time for.
    train = "train --model base --data d.jsonl --experts e.json --steps 99999 --save-every 9999 --quiet".split()
    process = started([*train, "--out", "a run"], work)
    metrics = work / "a run" / "metrics.jsonl"
    while not (metrics.is_file() and metrics.read_text().count("\n") > 2):
        assert os.waitpid(process, os.WNOHANG) == (0, 0), (work / "stderr").read_text()
        time.sleep(0.05)
    os.kill(process, number)
    ended, error = status(process), (work / "stderr").read_text()
    assert (ended, (work / "stdout").read_text(), "Traceback" in error) == (128 + number, "", False)
    start, goes_on = error.splitlines()[-1].split("; go on with: ")  # bars of other libraries come before
    assert re.fullmatch(rf"esft: {work}/a run: stopped after step \d+, which is saved", start)
    assert goes_on == shlex.join([sys.executable, "-m", "esft", *train, "--out", "a run", "--resume"])
    done = int(start.split("step ")[1].split(",")[0])
    words = [str(done + 2) if word == "99999" else word for word in shlex.split(goes_on)]
    assert status(started(words[3:], work)) == 0
    assert json.loads(metrics.read_text().splitlines()[-1])["step"] == done + 2

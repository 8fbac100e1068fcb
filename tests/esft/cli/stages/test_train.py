"""What ``esft train`` hands to the Python calls that it covers, and what it prints and writes."""

from dataclasses import asdict, fields
from types import SimpleNamespace

import pytest

import esft
from esft.cli.parser import main
from esft.cli.stages import train
from esft.runs.config import TrainConfig
from esft.selection import ExpertSelection
from esft.storage.files import write_yaml
from tests.esft.cli.conftest import stage, usage, values

RESULT = SimpleNamespace(
    train_loss=1.23456, trained_parameters=12345, stored_bytes=67890, seconds=5.6, before={}, after={}
)


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
    expected = ("m", ["d.jsonl"], "run", config, ExpertSelection({1: [0]}), {"": "d.jsonl"}, False, True)
    assert calls.of["train"] == [(expected, {"progress": False, "trust_remote_code": False, "mix": None})]
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


def test_train_measures_several_sets_by_name_and_tells_them_before_and_after(work, calls, capsys):
    scores = {"before": {"eval_a_loss": 2.0}, "after": {"eval_a_loss": 1.0}}
    calls.watch("train", SimpleNamespace(**(vars(RESULT) | scores)))
    stage("train --model m --data d.jsonl --out run --method full --eval-data a=d.jsonl --eval-data b=d.jsonl")
    assert calls.of["train"][0][0][5] == {"a": "d.jsonl", "b": "d.jsonl"}
    lines = capsys.readouterr().out.splitlines()
    assert [cell.strip() for cell in lines[2].strip("|").split("|")] == ["eval a_loss", "2.000", "1.000"]
    assert lines[3].startswith("loss 1.235, ")
    assert (
        main("train --model m --data d.jsonl --out run --method full --eval-data d.jsonl --eval-data b=d.jsonl".split())
        == 2
    )
    assert (
        capsys.readouterr().err
        == "esft: --eval-data d.jsonl: of several, each needs a name: --eval-data NAME=d.jsonl\n"
    )


def test_train_leaves_to_the_settings_what_it_is_not_told(work, calls):
    calls.watch("train", RESULT)
    stage("train --model m --data d.jsonl --out run --method full --trust-remote-code --mix d.jsonl:0.5")
    expected = ("m", ["d.jsonl"], "run", TrainConfig(method="full"), None, {}, False, False)
    assert calls.of["train"] == [(expected, {"progress": True, "trust_remote_code": True, "mix": "d.jsonl:0.5"})]


@pytest.mark.parametrize(
    ("more", "lr"),
    [
        ("--resume --steps 9", 0.5),
        ("--resume --config c.yaml", 0.125),
        ("--method full", None),
        ("--resume --lr 0.75", 0.75),
    ],  # fmt: skip
)
def test_a_run_that_resumes_has_the_settings_that_it_was_begun_with(work, calls, more: str, lr: float | None):
    calls.watch("train", RESULT)
    (work / "run").mkdir()
    write_yaml(work / "run" / "config.yaml", asdict(TrainConfig(lr=0.5)))
    write_yaml(work / "c.yaml", asdict(TrainConfig(lr=0.125)))
    stage(f"train --model m --data d.jsonl --out run {more}")
    (((*_, config, _, _, resume, _), _),) = calls.of["train"]
    assert config.lr == lr and resume == ("--resume" in more)


def test_a_run_that_goes_on_as_it_was_begun_reads_its_settings_itself(work, calls):
    calls.watch("train", RESULT)
    (work / "run" / "overwriting-done").mkdir(parents=True)  # where a kill may have left them
    write_yaml(work / "run" / "overwriting-done" / "config.yaml", asdict(TrainConfig(lr=0.5)))
    stage("train --model m --data d.jsonl --out run --resume")
    assert calls.of["train"][0][0][3] is None


def test_a_run_that_is_to_replace_another_resumes_with_its_own_settings_once_it_has_begun(work, calls):
    calls.watch("train", RESULT)
    for folder, lr in ((work / "run", 0.5), (work / "run" / "overwriting", 0.125)):
        folder.mkdir()
        write_yaml(folder / "config.yaml", asdict(TrainConfig(lr=lr)))
    stage("train --model m --data d.jsonl --out run --resume --steps 9")
    (work / "run" / "overwriting" / "origin.json").write_text("{}")  # written last
    stage("train --model m --data d.jsonl --out run --resume --steps 9")
    assert [config.lr for (_, _, _, config, *_), _ in calls.of["train"]] == [0.5, 0.125]


def test_resuming_where_no_run_is_is_left_to_the_training_to_refuse(work, calls):
    calls.watch("train", RESULT)
    stage("train --model m --data d.jsonl --out run --resume --lr 0.5")
    assert calls.of["train"][0][0][3] == TrainConfig(lr=0.5)


def test_esft_without_a_selection_says_which_flag_is_missing(work, calls, capsys):
    calls.watch("train", RESULT)
    assert main("train --model m --data d.jsonl --out run".split()) == 2
    assert capsys.readouterr().err == "esft: --method esft needs an expert selection: --experts\n"
    assert "train" not in calls.of


@pytest.mark.parametrize("option", ["--config run/c.yaml", "--experts run/e.json"])
def test_a_run_is_not_begun_over_the_files_that_say_how(work, calls, capsys, option: str):
    (work / "run").mkdir()
    (work / "run" / "c.yaml").write_text("lr: 0.5\n")
    ExpertSelection({1: [0]}).save(work / "run" / "e.json")
    assert main(f"train --model m --data d.jsonl --out run {option}".split()) == 2
    assert f"/run: the output would replace {option.split()[1]}, which is read" in capsys.readouterr().err
    assert "train" not in calls.of


def test_the_settings_of_a_file_are_listed_as_one(tmp_path, capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["train", "--help-config"])
    (tmp_path / "c.yaml").write_text(text := capsys.readouterr().out)
    assert esft.TrainConfig.load(tmp_path / "c.yaml") == esft.TrainConfig()
    for each, line in zip(fields(esft.TrainConfig), text.splitlines(), strict=True):
        assert line.startswith(f"{each.name}: ") and each.metadata["text"] in line and str(each.type) in line
        assert each.metadata["within"] in line and all(choice in line for choice in each.metadata["choices"])


def test_train_is_called_like_this(monkeypatch):
    shown = usage(monkeypatch, train)
    assert shown.startswith(
        "--model MODEL --data DATA [--mix DATA:SHARE] [--eval-data EVAL_DATA] [--experts EXPERTS] --out OUT "
        "[--config CONFIG] [--help-config] [--method {esft,full,lora}] [--lr X] "
    )
    assert shown.endswith(" [--resume] [--overwrite] [--trust-remote-code] [--quiet]")
    assert all(f" [--{each.name.replace('_', '-')} " in shown for each in fields(TrainConfig))
    assert values(monkeypatch, "train --model m --data d --out o") == {
        **dict.fromkeys(field.name for field in fields(TrainConfig)),
        **dict.fromkeys(("eval_data", "experts", "config", "mix")),
        "model": "m", "data": ["d"], "out": "o", "resume": False, "overwrite": False, "quiet": False,
        "trust_remote_code": False,
    }  # fmt: skip

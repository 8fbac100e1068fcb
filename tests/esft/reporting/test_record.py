from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import esft
from esft.reporting.record import Line, RunRecord, base_size, named
from esft.storage.files import write_json
from tests.esft.reporting.pages import SELECTION, make_run


def test_a_record_has_what_the_folder_has(tmp_path):
    run = make_run(tmp_path / "run", lr=3e-4)
    (run / "adapter").mkdir()
    write_json(run / "adapter" / "manifest.json", {"chosen_by": {"by": "token", "top_p": 0.2}})
    record = RunRecord.read(run)
    assert record.path == run and record.selection == SELECTION and record.steps == 4
    assert record.settings["lr"] == 3e-4 and list(record.settings)[:3] == ["method", "lr", "steps"]
    assert record.origin["model"] == "base" and record.origin["digests"].keys() >= {"model", "data", "settings"}
    assert record.chosen_by == {"by": "token", "top_p": 0.2}
    assert record.summary["train_loss"] == 1.25


def test_a_run_that_goes_on_is_read_as_far_as_it_is_written(tmp_path):
    run = make_run(tmp_path / "run", method="lora", ended=False)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "loss": 1.5, "lr": 0.1, "tokens_per_second": 9.0}\n{"step": 6, "lo')
    record = RunRecord.read(run)
    assert (record.steps, record.summary, record.figures, record.selection) == (5, None, {}, None)
    assert record.chosen_by == {} and record.settings["lr"] == 1e-4  # the paper's
    (run / "metrics.jsonl").unlink()
    assert RunRecord.read(run).steps == 0 and RunRecord.read(run).lines == {}


def test_figures_of_the_metrics_are_lines_and_of_two_in_a_step_the_later_counts(tmp_path):
    run = make_run(tmp_path / "run")
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "eval_loss": 9.0}\n')
    record = RunRecord.read(run)
    assert list(record.lines) == ["loss", "lr", "tokens_per_second", "eval_loss"]
    assert record.lines["eval_loss"] == Line("eval_loss", [2, 4], [2.75, 9.0])
    assert record.lines["loss"] == Line("loss", [1, 2, 3, 4], [3.5, 3.0, 2.5, 2.0])
    assert list(record.measured) == ["eval_loss"]


def test_an_evaluation_before_the_first_step_is_no_step(tmp_path):
    run = make_run(tmp_path / "run")
    lines = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text('{"step": 0, "eval_loss": 9.0}\n' + lines)
    record = RunRecord.read(run)
    assert record.steps == 4 and record.lines["eval_loss"].steps[0] == 0


def test_the_summarys_numbers_are_told_with_the_names_of_their_groups(tmp_path):
    run = make_run(tmp_path / "run")
    write_json(
        run / "summary.json",
        {"steps": 4, "data": "d", "ok": True, "vast": 10**400, "before": {"code": {"loss": 1.5}, "n": None}},
    )
    assert RunRecord.read(run).figures == {"steps": 4, "before.code.loss": 1.5}


@pytest.mark.parametrize("name", ["config.yaml", "origin.json"])
def test_a_folder_in_which_no_run_has_begun_is_refused(tmp_path, name: str):
    run = make_run(tmp_path / "run")
    (run / name).unlink()
    with pytest.raises(esft.InputError, match=rf"run: not the folder of a run that has begun, as it lacks {name}"):
        RunRecord.read(run)
    with pytest.raises(esft.InputError, match=r"absent: not the folder of a run that has begun$"):
        RunRecord.read(tmp_path / "absent")


@pytest.mark.parametrize("content", [[], {"chosen_by": 3}])
def test_a_manifest_that_is_none_is_named(tmp_path, content):
    run = make_run(tmp_path / "run")
    (run / "adapter").mkdir()
    write_json(run / "adapter" / "manifest.json", content)
    with pytest.raises(esft.InputError, match=r"adapter/manifest\.json: does not say how the experts were chosen"):
        RunRecord.read(run)


def test_runs_are_called_by_their_folders_and_by_their_paths_where_these_are_alike(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("a/run", "b/run", "c"):
        make_run(tmp_path / folder)
    monkeypatch.chdir(tmp_path / "c")
    assert named([RunRecord.read(path) for path in ("../a/run", ".")]) == ["run", "c"]
    assert named([RunRecord.read(path) for path in ("../a/run", "../b/run", ".")]) == ["../a/run", "../b/run", "c"]


def test_the_size_of_a_base_is_that_of_its_files(tmp_path):
    record = RunRecord.read(make_run(tmp_path / "run", model=str(tmp_path / "base")))
    assert base_size(record) is None
    (tmp_path / "base").mkdir()
    assert base_size(record) is None  # no weights
    save_file({"a": torch.zeros(3, 4, dtype=torch.bfloat16)}, tmp_path / "base" / "1.safetensors")
    save_file({"b": torch.zeros(5), "c": torch.zeros(())}, tmp_path / "base" / "2.safetensors")
    assert base_size(record) == (12 + 5 + 1, 24 + 20 + 4)
    save_file({"d": torch.zeros(8, dtype=torch.uint8)}, tmp_path / "base" / "3.safetensors")
    assert base_size(record) == (None, 24 + 20 + 4 + 8)
    assert Path(record.origin["model"]).is_dir()

"""The files of a run: what it is begun with, what it logs, what it resumes from."""

import hashlib
import importlib
import json
import os
import shutil
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoConfig

import esft
from esft.checkpoint.digest import forward_settings, model_digest
from esft.checkpoint.load import load_model
from esft.data.encoding import tokenizer_digests
from esft.runs.config import TrainConfig
from esft.runs.run_folder import RunFolder
from esft.selection import ExpertSelection
from tests.esft.models import save_tiny, tiny_tokenizer, write_records
from tests.esft.small_runs import SELECTION, breaks, metrics, run, settings

train_module = importlib.import_module("esft.training.loop")  # ``esft.train`` is the function
PAD = 258


def test_a_checkpoint_is_left_every_so_many_steps_but_not_at_the_end(base, out, fake):
    seen = []
    fake.before = lambda: seen.append(sorted(p.name for p in (out / "checkpoints").glob("*")))
    run(base, "run", settings(steps=6, save_every=2), eval_data=None)
    both = ["step-000002", "step-000004"]
    assert seen == [[], [], ["step-000002"], ["step-000002"], both, both]
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == both


@pytest.mark.parametrize(("at", "begins"), [(2, 0), (6, 4)])
def test_a_broken_run_goes_on_after_its_last_checkpoint(base, out, fake, at: int, begins: int):
    config = settings(steps=8, save_every=2, batch_size=10, eval_every=1)
    run(base, "whole", config)
    whole = list(zip(fake.batches, fake.drawn, strict=True))
    fake.batches.clear(), fake.drawn.clear()
    fake.before = breaks(at)
    with pytest.raises(KeyboardInterrupt):
        run(base, "run", config)
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "lo')  # a torn line
    if begins:
        (out / "checkpoints" / "step-000002" / "state.safetensors").write_text("an older one that is not used")
    logged = map(json.loads, (out / "metrics.jsonl").read_text().splitlines()[:-1])
    kept = [line for line in logged if line["step"] <= begins]
    fake.batches.clear(), fake.drawn.clear()
    fake.before = lambda: None
    (events,) = (out / "tensorboard").iterdir()  # read in the order of their seconds, which a short test may share
    events.rename(events.with_name(events.name.replace(events.name.split(".")[3], "0000000001")))
    run(base, "run", config, resume=True)
    assert list(zip(fake.batches, fake.drawn, strict=True)) == whole[begins:]
    assert metrics(out)[: len(kept)] == kept
    lines = [(line["step"], "loss" in line) for line in metrics(out)]
    assert lines == [(step, of_training) for step in range(1, 9) for of_training in (True, False)]
    board = EventAccumulator(str(out / "tensorboard")).Reload()
    shown = [event.step for event in board.Scalars("loss")]
    assert shown == list(range(1, 9))


def test_a_run_resumes_with_nothing_but_its_own_base_data_selection_and_settings(base, out, fake):
    folder = base.parent
    save_tiny(folder / "other", seed=1)
    write_records(folder / "other.jsonl", 16)
    run(base, "run", settings(steps=2), eval_data=None)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    data, config = folder / "d.jsonl", settings(steps=3)
    for model, records, other, selection, message in (
        (folder / "other", data, config, SELECTION, "cannot resume with model .*other: the run was begun with another"),
        (base, folder / "other.jsonl", config, SELECTION, "cannot resume with data .*other.jsonl: the run was begun"),
        (base, data, settings(lr=1.0), SELECTION, "cannot resume with lr 1.0: the run was begun with 0.003"),
        (base, data, config, ExpertSelection({1: [2]}), "cannot resume with another expert selection than .*run/exp"),
    ):
        with pytest.raises(esft.InputError, match=message):
            esft.train(str(model), records, out, other, selection, resume=True, progress=False)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_the_run_folder_says_what_was_trained_from_what(base, out, fake):
    config = settings(steps=1)
    result = esft.train(str(base), str(base.parent / "d.jsonl"), str(out), config, SELECTION, progress=False)
    assert TrainConfig.load(out / "config.yaml") == config
    assert ExpertSelection.load(out / "experts.json") == SELECTION
    digests = {
        "model": model_digest(load_model(str(base))),
        "data": hashlib.sha256((base.parent / "d.jsonl").read_bytes()).hexdigest(),
        **tokenizer_digests(tiny_tokenizer()),
    }
    origin = {"model": str(base), "data": str(base.parent / "d.jsonl")}
    written = json.loads((out / "origin.json").read_text())
    own = {name: written["digests"].pop(name) for name in ("settings", "selection")}
    settings_of_base = forward_settings(AutoConfig.from_pretrained(base))
    assert written == {**origin, "base_settings": settings_of_base, "digests": digests}
    assert all(len(digest) == 64 for digest in own.values())
    marker = json.loads((out / "esft_run.json").read_text())
    names = ("adapter.safetensors", "expert_cfg.json", "manifest.json")
    assert marker == {"format_version": 1, "outcome": [f"adapter/{name}" for name in names]}
    assert result.eval_loss is None


ORIGIN = {"model": "m", "data": "d", "digests": {"model": "1", "data": "2"}}


def begun(path, selection: ExpertSelection | None = SELECTION) -> RunFolder:
    folder = RunFolder(path)
    folder.begin(settings(), ORIGIN, selection)
    return folder


def test_a_run_has_begun_when_its_origin_stands_and_before_that_it_was_broken_off(tmp_path, monkeypatch):
    kinds, real = [], os.replace

    def watched(source, target) -> None:
        kinds.append((folder.begun, folder.broken_off))
        real(source, target)

    folder = RunFolder(tmp_path / "run")
    monkeypatch.setattr(os, "replace", watched)
    folder.begin(settings(), ORIGIN, SELECTION)
    assert kinds == [(False, True)] * 4 and folder.begun and not folder.broken_off


def test_a_link_among_what_is_left_of_a_beginning_is_not_written_through(tmp_path):
    folder = begun(tmp_path / "run")
    (folder.path / "origin.json").unlink()
    assert folder.broken_off
    (folder.path / "config.yaml").rename(tmp_path / "mine.yaml")
    (folder.path / "config.yaml").symlink_to(tmp_path / "mine.yaml")
    with pytest.raises(esft.InputError, match=r"run/config\.yaml: is no regular file, where a run has one$"):
        _ = folder.broken_off


@pytest.mark.parametrize(
    "mine", ["thesis", "experts.json.bak", "checkpoints/thesis", "adapter/thesis", "overwriting.md"]
)
def test_what_a_run_has_not_written_is_named(tmp_path, mine: str):
    folder = begun(tmp_path / "run")
    folder.check_ours()
    (tmp_path / "run" / mine).parent.mkdir(exist_ok=True)
    (tmp_path / "run" / mine).write_text("years of work")
    with pytest.raises(esft.InputError, match=f"run: holds {mine}, which no run has written; move it elsewhere"):
        folder.check_ours()
    if mine.startswith("adapter"):
        with pytest.raises(esft.InputError, match="adapter: holds thesis, which is no part of what is overwritten"):
            folder.check_outcome()


@pytest.mark.parametrize("marker", ["{}", "[]", '{"outcome": 1, "format_version": 1}', '{"outcome": [1]}', "{"])
def test_a_marker_that_is_none_is_named(tmp_path, marker: str):
    folder = begun(tmp_path / "run")
    (tmp_path / "run" / "esft_run.json").write_text(marker)
    with pytest.raises(esft.InputError, match=r"esft_run\.json: (is no run's marker|line 1)"):
        folder.check_ours()
    for version in ("2", "true"):
        (tmp_path / "run" / "esft_run.json").write_text(f'{{"outcome": [], "format_version": {version}}}')
        with pytest.raises(esft.InputError, match=r"esft_run\.json: format_version must be 1"):
            folder.check_ours()


def test_the_settings_and_the_selection_of_a_run_are_those_that_it_was_begun_with(tmp_path):
    folder = begun(tmp_path / "run")
    for name, change in (
        ("config.yaml", lambda text: text.replace("lr: 0.003", "lr: 0.004")),
        ("config.yaml", lambda _: ""),
        ("config.yaml", lambda text: text.replace("seed: 0", "seed: 1")),
        ("experts.json", lambda text: text.replace("7", "6")),
        ("experts.json", lambda text: text.replace('"shared_experts": false', '"shared_experts": true')),
    ):
        text = (tmp_path / "run" / name).read_text()
        (tmp_path / "run" / name).write_text(changed := change(text))
        assert changed != text
        with pytest.raises(esft.InputError, match=f"{name}: was changed since the run was begun$"):
            folder.begun_with(None, None)
        (tmp_path / "run" / name).write_text(text)
    (tmp_path / "run" / "experts.json").unlink()
    with pytest.raises(esft.InputError, match=r"experts\.json: was changed"):
        folder.begun_with(None, None)


@pytest.mark.parametrize("origin", ["[]", "{}", '{"digests": 1}', '{"digests": {"model": "1"}}'])
def test_an_origin_that_is_none_is_named(tmp_path, origin: str):
    folder = begun(tmp_path / "run")
    (tmp_path / "run" / "origin.json").write_text(origin)
    with pytest.raises(esft.InputError, match=r"origin\.json: does not say what the run was begun with"):
        folder.begun_with(None, None)


@pytest.mark.parametrize("changed", ["tokenizer", "chat template"])
def test_a_run_does_not_go_on_with_another_tokenizer_or_chat_template_of_its_base(base, out, fake, changed: str):
    run(base, "run", settings(steps=2), eval_data=None)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    tokenizer = tiny_tokenizer()
    if changed == "tokenizer":
        tokenizer.add_tokens("say")
    else:
        tokenizer.chat_template = str(tokenizer.chat_template).replace("<|end|>", "<|end|> ")
    tokenizer.save_pretrained(base)
    match = f"^cannot resume with model {base}: the run was begun with another {changed}$"
    with pytest.raises(esft.InputError, match=match):
        run(base, "run", settings(steps=3), resume=True, eval_data=None)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    tiny_tokenizer().save_pretrained(base)
    run(base, "run", settings(steps=3), resume=True, eval_data=None)


def test_a_run_of_before_there_were_digests_goes_on(base, out, fake):
    run(base, "whole", settings(steps=4, save_every=2), eval_data=None)
    fake.batches.clear()
    fake.before = breaks(4)
    with pytest.raises(KeyboardInterrupt):
        run(base, "run", settings(steps=4, save_every=2), eval_data=None)
    (out / "esft_run.json").unlink()
    origin = json.loads((out / "origin.json").read_text())
    origin["digests"] = {name: origin["digests"][name] for name in ("model", "data")}
    (out / "origin.json").write_text(json.dumps(origin))
    (out / "checkpoints" / "step-000002" / "state.json").write_text('{"step": 2}')
    with pytest.raises(esft.InputError, match="it may be a run of an earlier version: `resume=True` first"):
        run(base, "run", settings(), overwrite=True)
    fake.before = lambda: None
    run(base, "run", settings(steps=4, save_every=2), resume=True, eval_data=None)
    for name in ("adapter/adapter.safetensors", "origin.json", "esft_run.json"):
        assert (out / name).read_bytes() == (base.parent / "whole" / name).read_bytes()
    run(base, "run", settings(steps=1), overwrite=True, eval_data=None)
    assert [line["step"] for line in metrics(out)] == [1]


@pytest.mark.parametrize("selection", [SELECTION, None])
def test_a_run_goes_on_with_what_it_was_begun_with_unless_told_for_how_long(tmp_path, selection):
    folder = begun(tmp_path / "run", selection)
    assert folder.begun_with(None, None) == (settings(), selection)
    assert folder.begun_with(settings(steps=99), selection) == (settings(steps=99), selection)
    for config, other, message in ((settings(lr=1.0), None, "lr 1.0"), (None, ExpertSelection({1: [2]}), "selection")):
        with pytest.raises(esft.InputError, match=f"^cannot resume with .*{message}"):
            folder.begun_with(config, other)


def test_a_run_that_has_ended_has_done_its_steps_though_its_checkpoints_are_gone(tmp_path):
    folder = begun(tmp_path / "run")
    folder.write_summary({"steps": 7})
    assert folder.begun_with(settings(steps=7), None)[0].steps == 7
    with pytest.raises(esft.InputError, match="^cannot resume with steps 6: .*run has done 7$"):
        folder.begun_with(settings(steps=6), None)


def test_a_run_that_is_begun_again_without_a_selection_has_none_of_before(tmp_path):
    begun(tmp_path / "run")
    assert begun(tmp_path / "run", None).begun_with(None, None) == (settings(), None)


def test_the_base_and_the_data_are_told_by_their_digests_and_named_by_their_paths(tmp_path):
    folder = begun(tmp_path / "run")
    folder.check_origin({"model": "1", "data": "2"}, {"top_k": 3}, {"model": "elsewhere", "data": "d"})
    folder.check_origin({"model": "1-9", "data": "2"}, {}, {"model": "m", "data": "d"})  # a run of before has a part
    with pytest.raises(esft.InputError, match=r"^cannot resume with data e\.jsonl: the run was begun with another$"):
        folder.check_origin({"model": "1", "data": "3"}, {}, {"model": "m", "data": "e.jsonl"})


@pytest.mark.parametrize("part", ["tokenizer", "chat template"])
def test_another_tokenizer_or_chat_template_is_named_but_to_a_run_of_before_there_were_digests_of_them(tmp_path, part):
    digests, paths = ORIGIN["digests"] | {"tokenizer": "3", "chat template": "4"}, {"model": "m", "data": "d"}
    begun(tmp_path / "before").check_origin(digests, {}, paths)
    folder = RunFolder(tmp_path / "run")
    folder.begin(settings(), ORIGIN | {"digests": digests}, SELECTION)
    folder.check_origin(digests, {}, paths)
    with pytest.raises(esft.InputError, match=f"^cannot resume with model m: the run was begun with another {part}$"):
        folder.check_origin(digests | {part: "5"}, {}, paths)


def test_a_model_of_another_configuration_is_not_the_one_of_the_run(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.begin(settings(), ORIGIN | {"base_settings": {"top_k": 3, "theta": 1e4}}, SELECTION)
    digests, paths = ORIGIN["digests"], {"model": "m", "data": "d"}
    folder.check_origin(digests, {"top_k": 3, "of a later version": 1}, paths)
    with pytest.raises(
        esft.InputError, match="^cannot resume with model m: its top_k is 2, and was 3 when the run was"
    ):
        folder.check_origin(digests, {"top_k": 2, "theta": 1e4}, paths)


@pytest.mark.parametrize(
    "change",
    [
        {"model": 5}, {"data": None}, {"digests": None}, {"digests": {"model": "1"}}, {"base_settings": []},
        {"digests": {"model": 1, "data": "2"}}, {"digests": {"model": "1", "data": "2", "settings": 5}},
    ],
    ids=str,
)  # fmt: skip
def test_an_origin_of_other_types_is_none(tmp_path, change: dict):
    folder = begun(tmp_path / "run")
    (tmp_path / "run" / "origin.json").write_text(json.dumps(ORIGIN | change))
    with pytest.raises(esft.InputError, match=r"origin\.json: does not say what the run was begun with$"):
        folder.origin()


def test_a_link_in_the_place_of_the_outcome_is_not_followed(tmp_path):
    folder = begun(tmp_path / "run")
    (tmp_path / "mine").mkdir()
    (tmp_path / "run" / "adapter").symlink_to(tmp_path / "mine")
    with pytest.raises(esft.InputError, match="run/adapter: is a link, where a run has a folder of its own$"):
        folder.check_outcome()


def test_a_link_in_the_place_of_what_wandb_knows_the_run_by_is_not_written_through(tmp_path):
    folder = begun(tmp_path / "run")
    (tmp_path / "mine").touch()
    (tmp_path / "run" / "wandb_id.txt").symlink_to(tmp_path / "mine")
    with pytest.raises(esft.InputError, match=r"wandb_id\.txt: is no regular file, where a run has one$"):
        folder.check_outcome()


def test_bad_metrics_are_told_of_before_a_run_that_goes_on_writes_anything(tmp_path):
    folder = begun(tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": "x"}\n')
    with pytest.raises(esft.InputError, match=r"metrics\.jsonl: line 1: names no step"):
        folder.begun_with(None, None)


def test_a_run_that_lacks_what_it_was_begun_with_is_said_to(tmp_path):
    folder = begun(tmp_path / "run")
    assert RunFolder(tmp_path).why_not_begun == ""
    (tmp_path / "run" / "metrics.jsonl").touch()
    for name in ("origin.json", "config.yaml"):
        (tmp_path / "run" / name).unlink()
        assert folder.why_not_begun == f", as it lacks {name}"


def test_checkpoints_that_are_gone_are_told_of(base, out, fake):
    run(base, "run", settings(steps=4, save_every=2), eval_data=None)
    shutil.rmtree(out / "checkpoints")
    with pytest.warns(UserWarning, match="run: its checkpoints are gone; the run begins at its first step"):
        run(base, "run", settings(steps=5, save_every=2), eval_data=None, resume=True)
    assert [line["step"] for line in metrics(out)] == [1, 2, 3, 4, 5]


def test_a_summary_that_is_none_is_named(tmp_path):
    assert RunFolder(tmp_path).summary() is None
    for text in ("[]", '{"steps": "6"}', '{"steps": -1}', '{"steps": true}'):
        (tmp_path / "summary.json").write_text(text)
        with pytest.raises(esft.InputError, match=r"summary\.json: not a run's summary"):
            RunFolder(tmp_path).summary()


NAMES = ["config.yaml", "experts.json", "origin.json", "summary.json", "metrics.jsonl", "esft_run.json"]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_file_in_a_files_place_is_named(tmp_path, name: str):
    path = tmp_path / name
    (tmp_path / "mine").touch()
    links = [lambda path, to=to: path.symlink_to(to) for to in (path, os.devnull, tmp_path / "mine", "nothing")]
    for make in (Path.mkdir, os.mkfifo, *links):
        assert not RunFolder(tmp_path).holds(name)
        make(path)
        with pytest.raises(esft.InputError, match=f"/{name}: is no regular file, where a run has one$"):
            RunFolder(tmp_path).holds(name)
        path.rmdir() if path.is_dir() else path.unlink()


def test_a_run_where_no_folder_can_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(esft.DiskError, match="/file/run: Not a directory$"),
        RunFolder(tmp_path / "file" / "run").lock(),
    ):
        pass


@pytest.mark.parametrize("missing", ["config.yaml", "origin.json"])
def test_a_run_has_begun_when_its_settings_and_its_origin_are_there(tmp_path, missing: str):
    folder = RunFolder(tmp_path / "run")
    folder.begin(settings(), {"model": "m", "data": "d", "digests": {"model": "1", "data": "2"}}, SELECTION)
    assert folder.begun
    (folder.path / missing).unlink()
    assert not folder.begun


def test_what_is_stored_is_the_outcomes_tensors(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.begin(settings(), {"model": "m", "data": "d", "digests": {"model": "1", "data": "2"}}, SELECTION)
    with folder.outcome("model") as place:
        for name, size in (("a.safetensors", 30), ("b.safetensors", 12), ("config.json", 500)):
            (place / name).write_bytes(bytes(size))
    (folder.path / "other.safetensors").write_bytes(bytes(7))
    assert folder.stored_bytes() == 42

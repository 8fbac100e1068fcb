"""Whole training runs: every method learns, saves memory alike, and goes on after it broke."""

import importlib
import json
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import esft
from esft.adapters.load_any import load_any_adapter
from esft.checkpoint.load import load_model, load_tokenizer
from esft.data.encoding import encode_all
from esft.data.sources import read_records
from esft.evaluation.loss import mean_loss
from esft.selection import ExpertSelection
from esft.training import steps
from tests.esft.models import chat, tiny_encoder, token_batch, write_records
from tests.esft.small_runs import SELECTION, base_and_data, breaks, column, metrics, run, settings


@pytest.fixture
def base(tmp_path):
    return base_and_data(tmp_path)


@pytest.mark.parametrize("less", [{"micro_batch_size": 3}, {"recompute": "layers"}, {"recompute": "frozen"}])
@pytest.mark.parametrize("method", ["esft", "full", "lora"])
def test_less_memory_trains_alike(base, method: str, less: dict):
    if method == "lora":
        pytest.importorskip("peft")
    # Answers of unlike lengths: micro batches hold unlike numbers of supervised tokens.
    records = [chat("say " + "ab" * (i % 4), "c" * (1 + 7 * (i % 3))) for i in range(24)]
    (base.parent / "d.jsonl").write_text("".join(json.dumps({"messages": r}) + "\n" for r in records))
    selection = SELECTION if method == "esft" else None
    # Steps so small that rounding, which AdamW's first steps blow up, does not grow.
    plain, lean = (
        run(base, name, settings(method=method, steps=3, dtype="float32", lr=1e-4, **more), selection)
        for name, more in (("plain", {}), ("lean", less))
    )
    folders = base.parent / "plain", base.parent / "lean"
    assert column(folders[1], "loss") == pytest.approx(column(folders[0], "loss"), rel=1e-5)
    assert column(folders[1], "grad_norm") == pytest.approx(column(folders[0], "grad_norm"), rel=1e-4)
    assert lean.eval_loss == pytest.approx(plain.eval_loss, rel=1e-5)


@pytest.mark.parametrize("method", ["esft", "full", "lora"])
def test_every_method_learns_and_leaves_a_whole_run_folder(base, method: str):
    if method == "lora":
        pytest.importorskip("peft")
    out = base.parent / "run"
    result = run(base, "run", settings(method=method, steps=20), SELECTION if method == "esft" else None)
    curve = column(out, "loss")
    assert len(curve) == 20
    assert curve[-1] < curve[0] - 0.1
    assert result.eval_loss is not None and result.eval_loss < curve[0]
    assert yaml.safe_load((out / "config.yaml").read_text())["method"] == method
    assert list((out / "tensorboard").iterdir())
    assert json.loads((out / "summary.json").read_text())["stored_bytes"] == result.stored_bytes > 0

    tuned = load_model(str(out / "model" if method == "full" else base))
    if method != "full":
        tuned = load_any_adapter(tuned, out / "adapter")
    examples = encode_all(tiny_encoder(), read_records(base.parent / "d.jsonl"), "d")
    assert mean_loss(tuned, examples, 258, 8) == pytest.approx(result.eval_loss, rel=1e-4)


@pytest.mark.parametrize(
    "method, dtype, dropout, optimizer",
    [
        ("esft", "float32", 0.0, "adamw"),
        ("esft", "bfloat16", 0.0, "adamw"),
        ("esft", "float32", 0.2, "adamw"),
        ("esft", "float32", 0.0, "adamw_8bit"),
        ("esft", "bfloat16", 0.0, "adamw_8bit"),
        ("lora", "float32", 0.0, "adamw"),
    ],
)
def test_a_broken_run_resumes_to_the_same_end(base, monkeypatch, method, dtype: str, dropout: float, optimizer: str):
    selection = SELECTION if method == "esft" else None
    short = {"steps": 12} if method == "esft" else {"steps": 4, "save_every": 2, "eval_every": 4}
    how = settings(method=method, dtype=dtype, optimizer=optimizer, **short)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"attention_dropout": dropout}))
    whole = run(base, "whole", how, selection)
    real, calls = steps.batch_loss, []

    def breaks(*args):
        calls.append(1)
        if len(calls) == (8 if method == "esft" else 4):
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(steps, "batch_loss", breaks)
    with pytest.raises(KeyboardInterrupt):
        run(base, "broken", how, selection)
    monkeypatch.setattr(steps, "batch_loss", real)
    assert not (base.parent / "broken" / "adapter").exists()
    resumed = run(base, "broken", how, selection, resume=True)
    assert column(base.parent / "broken", "loss") == column(base.parent / "whole", "loss")
    assert resumed.eval_loss == whole.eval_loss
    one, other = (base.parent / name / "adapter" for name in ("whole", "broken"))
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    assert any(name.endswith(".safetensors") for name in names)
    assert all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


def test_moments_in_8_bits_learn_what_those_in_float32_do(base):
    plain, short = (run(base, name, settings(steps=20, optimizer=name)) for name in ("adamw", "adamw_8bit"))
    first = column(base.parent / "adamw", "loss")[0]
    assert short.train_loss == pytest.approx(plain.train_loss, abs=0.05 * (first - plain.train_loss))
    assert column(base.parent / "adamw_8bit", "loss") != column(base.parent / "adamw", "loss")


def test_full_fine_tuning_stores_a_checkpoint_that_stock_transformers_loads(base):
    run(base, "run", settings(method="full"), None)
    model = AutoModelForCausalLM.from_pretrained(base.parent / "run" / "model").eval()
    assert model(**token_batch()).logits.isfinite().all()
    assert load_tokenizer(str(base.parent / "run" / "model")).get_vocab() == load_tokenizer(str(base)).get_vocab()
    names = load_file(base.parent / "run" / "model" / "model.safetensors").keys()
    assert names == load_file(base / "model.safetensors").keys()


def test_the_auxiliary_loss_is_off_by_default_and_falls_where_it_is_asked_for(base):
    selection = ExpertSelection({1: [2, 7], 2: [0]}, non_expert_modules=True)
    run(base, "plain", settings(steps=2), selection)
    run(base, "balanced", settings(steps=12, aux_loss=3.0), selection)
    assert column(base.parent / "plain", "aux_loss") == []
    curve = column(base.parent / "balanced", "aux_loss")
    assert len(curve) == 12
    assert 2 < curve[-1] < curve[0] - 0.1  # two layers, each at least about 1


def test_esft_changes_the_selected_experts_and_nothing_else(base):
    run(base, "run", settings(steps=2))
    esft.merge(base, base.parent / "run" / "adapter", base.parent / "merged")
    before, after = load_file(base / "model.safetensors"), load_file(base.parent / "merged" / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {
        f"model.layers.{layer}.mlp.experts.{e}.{p}_proj.weight"
        for layer, ids in SELECTION.experts.items()
        for e in ids
        for p in ("gate", "up", "down")
    }


def test_two_runs_of_one_seed_are_the_same_and_another_seed_is_not(base):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(base, name, settings(seed=seed, steps=3))
    a, b, c = (column(base.parent / name, "loss") for name in "abc")
    assert a == b != c


PACKED = [
    {"packing": True, "max_length": 60},
    {"packing": True, "max_length": 60, "packing_strategy": "wrapped"},
    {"padding_free": True, "micro_batch_size": 4},
    {"streaming": True},
]


@pytest.mark.parametrize("how", PACKED, ids=str)
def test_a_run_whose_rows_are_made_otherwise_resumes_to_the_same_end(base, monkeypatch, how: dict):
    config = settings(steps=4, save_every=2, eval_every=4, **how)
    whole = run(base, "whole", config)
    real, count = steps.batch_loss, breaks(3 if "padding_free" not in how else 6)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(steps, "batch_loss", lambda *args: count() or real(*args))
        run(base, "broken", config)
    assert run(base, "broken", None, None, resume=True).train_loss == whole.train_loss
    one, other = (load_file(base.parent / name / "adapter" / "adapter.safetensors") for name in ("whole", "broken"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("aux_loss", [0.0, 0.1])
def test_a_step_over_all_records_has_the_same_loss_however_they_lie(base, aux_loss: float):
    common = {"steps": 1, "method": "full", "dtype": "float32", "aux_loss": aux_loss, "batch_size": 99}
    ways = {"padded": {}, "packed": {"packing": True, "max_length": 60}, "free": {"padding_free": True}}
    lines = []
    for name, how in ways.items():
        run(base, name, settings(**common, **how), None, eval_data=None)
        lines += metrics(base.parent / name)
    for line in lines[1:]:
        for figure in ("loss", "grad_norm", *(["aux_loss"] if aux_loss else [])):
            assert line[figure] == pytest.approx(lines[0][figure], rel=1e-4)


def test_a_model_that_does_not_keep_documents_apart_is_refused_before_anything_is_written(base, monkeypatch):
    def refuse(model) -> None:
        raise esft.InputError("packing: they see each other")

    monkeypatch.setattr(steps, "check_separates", refuse)
    for how in ({"packing": True}, {"padding_free": True}, {"eval_packing": True}):
        with pytest.raises(esft.InputError, match="^packing: they see each other$"):
            run(base, "run", settings(**how))
    assert not (base.parent / "run").exists()
    run(base, "run", settings(steps=1, packing=False, eval_packing=False))


def test_the_data_is_reported_before_it_is_trained_on(base, caplog):
    with caplog.at_level("INFO", "esft"):
        run(base, "run", settings(steps=1), eval_data=None)
    line, about = (each.getMessage() for each in caplog.records if each.levelname == "INFO")
    assert line.startswith(
        f"{base.parent / 'd.jsonl'}: 24 records, 312 tokens (longest 13), 0 truncated, 0 left out; loss"
    )
    assert about == "esft: 3 experts of 2 layers, 5,760 parameters, 1 step of 8 records"
    caplog.clear()
    with caplog.at_level("INFO", "esft"):
        run(base, "full", settings(method="full", steps=2, save_every=1, packing=True, eval_packing=False), None)
        run(base, "full", settings(method="full", steps=3, save_every=1, packing=True, eval_packing=False), None,
            resume=True)  # fmt: skip
    about = [line for each in caplog.records if (line := each.getMessage()).startswith("full: ")]
    assert [line.split(" parameters, ")[1] for line in about] == [
        "2 steps of 8 packed rows, loss of evaluation data every 6",
        "2 more steps of 8 packed rows, loss of evaluation data every 6",
    ]


def test_the_memory_is_planned_before_the_model_is_loaded(base, caplog, monkeypatch):
    def told(out: str, **how) -> list[str]:
        caplog.clear()
        with caplog.at_level("INFO", "esft"):
            run(base, out, settings(steps=1, micro_batch_size=3), eval_data=None, **how)
        return [line for each in caplog.records if (line := each.getMessage()).startswith("memory: ")]

    loop, asked = importlib.import_module("esft.training.loop"), []  # ``esft.train`` is the function

    def planned(*given, **named):
        asked.append((given, named))
        return SimpleNamespace(peak=12_340_000_000)

    monkeypatch.setattr(loop, "plan", planned)
    line = "memory: 12.3 GB at the most, as planned for 39 tokens in 3 rows together"
    assert told("run", progress=True) == [line] and told("quiet") == []
    config = settings(steps=1, micro_batch_size=3)
    assert asked == [((str(base), SELECTION, config), {"frozen": "auto", "tokens": 3 * 13, "trust_remote_code": False})]

    def refuses(*_, **__):
        raise esft.InputError("no numbers")

    monkeypatch.setattr(loop, "plan", refuses)
    assert told("unplanned", progress=True) == ["memory: not planned (no numbers)"]


def test_several_sources_train_and_are_remembered(base):
    one, two = base.parent / "d.jsonl", write_records(base.parent / "e.jsonl", 5)
    config, data = settings(steps=3, save_every=2), [f"{one}:1", f"{two}:2"]
    esft.train(str(base), data, base.parent / "run", config, SELECTION, progress=False)
    assert json.loads((base.parent / "run" / "origin.json").read_text())["data"] == f"{one}:1, {two}:2"
    esft.train(str(base), data, base.parent / "run", None, None, resume=True, progress=False)
    for other in (one, [f"{one}:1", f"{two}:3"]):
        with pytest.raises(esft.InputError, match="^cannot resume with data .*: the run was begun with another"):
            esft.train(str(base), other, base.parent / "run", None, None, resume=True, progress=False)


def test_general_data_that_is_mixed_in_trains_and_is_a_part_of_what_a_run_goes_on_with(base):
    general = write_records(base.parent / "general.jsonl", 7)
    mixed = settings(steps=6, save_every=3)
    run(base, "run", mixed, SELECTION, mix=f"{general}:0.5")
    run(base, "plain", mixed, SELECTION)
    folders = [base.parent / name for name in ("run", "plain")]
    assert column(folders[0], "loss")[0] != column(folders[1], "loss")[0]
    assert json.loads((folders[0] / "origin.json").read_text())["data"].endswith(f", mixed with {general}:0.5")
    longer = settings(steps=8, save_every=3)
    with pytest.raises(esft.InputError, match="data"):
        run(base, "run", longer, SELECTION, resume=True, mix=f"{general}:0.25")
    with pytest.raises(esft.InputError, match="data"):
        run(base, "run", longer, SELECTION, resume=True)
    run(base, "run", longer, SELECTION, resume=True, mix=f"{general}:0.5")
    assert len(column(folders[0], "loss")) == 8
    with pytest.raises(esft.InputError, match=r"general.jsonl:2: mixed in is a share of the records below 1"):
        run(base, "other", mixed, SELECTION, mix=f"{general}:2")
    assert not (base.parent / "other").exists()


@pytest.mark.parametrize("method", ["esft", "lora"])
def test_a_model_is_held_to_its_base_on_what_is_mixed_in_and_a_resumed_run_to_the_same_base(base, method: str):
    if method == "lora":
        pytest.importorskip("peft")
    selection = SELECTION if method == "esft" else None
    mix = f"{write_records(base.parent / 'general.jsonl', 7)}:0.5"
    found = {}
    for name, weight, last in (("loose", 1e-6, 8), ("held", 100.0, 8), ("broken", 100.0, 4)):
        config = settings(method=method, steps=last, save_every=4, kl_weight=weight, micro_batch_size=3)
        run(base, name, config, selection, mix=mix)
        found[name] = column(base.parent / name, "kl")
    assert found["held"][0] == pytest.approx(0, abs=1e-5)  # it begins as its base
    assert 0 < found["held"][-1] < 0.5 * found["loose"][-1]
    config = settings(method=method, steps=8, save_every=4, kl_weight=100.0, micro_batch_size=3)
    run(base, "broken", config, selection, resume=True, mix=mix)
    assert column(base.parent / "broken", "kl") == found["held"]
    with pytest.raises(esft.InputError, match=r"^kl_weight holds the model to its base on data that is mixed in"):
        run(base, "other", config, selection)
    assert not (base.parent / "other").exists()

import importlib
import json

import pytest
import torch
import yaml
from esft.config import TrainConfig
from esft.evaluate import load_any_adapter
from esft.select import ExpertSelection
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import esft
from esft.checkpoint import load_model
from tests.esft.models import save_tiny, token_batch, write_records

train_module = importlib.import_module("esft.train")  # ``esft.train`` is the function

SELECTION = ExpertSelection({1: [2, 7], 2: [0]})


def settings(**more) -> TrainConfig:
    return TrainConfig(**({"lr": 3e-3, "steps": 12, "batch_size": 8, "eval_every": 6, "save_every": 5} | more))


@pytest.fixture
def base(tmp_path):
    write_records(tmp_path / "d.jsonl")
    return save_tiny(tmp_path / "base")


def run(base, out: str, config: TrainConfig, selection=SELECTION, **more):
    folder = base.parent
    return esft.train(
        str(base), folder / "d.jsonl", folder / out, config, selection, eval_data=folder / "d.jsonl",
        progress=False, **more,
    )  # fmt: skip


def losses(folder) -> list[float]:
    return [m["loss"] for m in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if "loss" in m]


@pytest.mark.parametrize("less", [{"micro_batch_size": 3}, {"recompute": "layers"}, {"recompute": "frozen"}])
@pytest.mark.parametrize("method", ["esft", "full", "lora"])
def test_less_memory_trains_alike(base, method: str, less: dict):
    if method == "lora":
        pytest.importorskip("peft")
    selection = SELECTION if method == "esft" else None
    # Steps so small that rounding, which AdamW's first steps blow up, does not grow.
    plain, lean = (
        run(base, name, settings(method=method, steps=3, dtype="float32", lr=1e-4, **more), selection)
        for name, more in (("plain", {}), ("lean", less))
    )
    assert losses(base.parent / "lean") == pytest.approx(losses(base.parent / "plain"), rel=1e-5)
    assert lean.eval_loss == pytest.approx(plain.eval_loss, rel=1e-5)
    norms = [
        [
            m["grad_norm"]
            for m in map(json.loads, (base.parent / name / "metrics.jsonl").read_text().splitlines())
            if "loss" in m
        ]
        for name in ("plain", "lean")
    ]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_layers_are_made_again_in_the_backward(base, monkeypatch):
    calls = []
    real = train_module.batch_loss
    monkeypatch.setattr(
        train_module,
        "batch_loss",
        lambda model, batch: (
            calls.append(any(getattr(m, "gradient_checkpointing", False) for m in model.modules()))
            or real(model, batch)
        ),
    )
    run(base, "layers", settings(steps=1, batch_size=8, micro_batch_size=3, recompute="layers"))
    assert calls == [True] * 3


@pytest.mark.parametrize("method", ["esft", "full", "lora"])
def test_every_method_learns_and_leaves_a_whole_run_folder(base, method: str):
    if method == "lora":
        pytest.importorskip("peft")
    out = base.parent / "run"
    result = run(base, "run", settings(method=method, steps=20), SELECTION if method == "esft" else None)
    curve = losses(out)
    assert len(curve) == 20
    assert curve[-1] < curve[0] - 0.1
    assert result.eval_loss is not None and result.eval_loss < curve[0]
    assert yaml.safe_load((out / "config.yaml").read_text())["method"] == method
    assert list((out / "tensorboard").iterdir())
    assert json.loads((out / "summary.json").read_text())["stored_bytes"] == result.stored_bytes > 0

    tuned = load_model(str(out / "model" if method == "full" else base))
    if method != "full":
        tuned = load_any_adapter(tuned, out / "adapter")
    from esft.data import encode_all, read_records
    from esft.evaluate import mean_loss

    from tests.esft.models import tiny_tokenizer

    examples = encode_all(tiny_tokenizer(), read_records(base.parent / "d.jsonl"), 99, "d")
    assert mean_loss(tuned, examples, 258, 8) == pytest.approx(result.eval_loss, rel=1e-4)


def test_esft_changes_the_selected_experts_and_nothing_else(base):
    run(base, "run", settings())
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
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(base, out, settings(seed=seed))
    a, b, c = (losses(base.parent / out) for out in "abc")
    assert a == b != c


@pytest.mark.parametrize("dtype, dropout", [("float32", 0.0), ("bfloat16", 0.0), ("float32", 0.2)])
def test_a_broken_run_resumes_to_the_same_end(base, monkeypatch, dtype: str, dropout: float):
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"attention_dropout": dropout}))
    whole = run(base, "whole", settings(dtype=dtype))
    real, calls = train_module.batch_loss, []

    def breaks(*args):
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(train_module, "batch_loss", breaks)
    with pytest.raises(KeyboardInterrupt):
        run(base, "broken", settings(dtype=dtype))
    monkeypatch.setattr(train_module, "batch_loss", real)
    assert not (base.parent / "broken" / "adapter").exists()
    resumed = run(base, "broken", settings(dtype=dtype), resume=True)
    assert losses(base.parent / "broken") == losses(base.parent / "whole")
    assert resumed.eval_loss == whole.eval_loss
    one, other = (load_file(base.parent / r / "adapter" / "adapter.safetensors") for r in ("whole", "broken"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_full_fine_tuning_stores_a_checkpoint_that_stock_transformers_loads(base):
    run(base, "run", settings(method="full"), None)
    model = AutoModelForCausalLM.from_pretrained(base.parent / "run" / "model").eval()
    assert model(**token_batch()).logits.isfinite().all()
    names = load_file(base.parent / "run" / "model" / "model.safetensors").keys()
    assert names == load_file(base / "model.safetensors").keys()


def test_bad_input_leaves_nothing_behind(base):
    folder = base.parent
    (folder / "bad.jsonl").write_text("{\n")
    save_tiny(folder / "other")
    cases = [
        (lambda: run(base, "x", settings(), None), "method esft needs expert selection"),
        (lambda: run(base, "x", settings(method="full")), "method full takes no expert selection"),
        (lambda: run(base, "x", settings(), ExpertSelection({9: [0]})), "names layer 9"),
        (lambda: esft.train(str(base), folder / "bad.jsonl", folder / "x", settings(), SELECTION), "line 1"),
        (lambda: run(base, "x", settings(), resume=True), "holds no run to resume"),
        (lambda: run(base, "x", settings(), resume=True, overwrite=True), "exclude each other"),
        (lambda: run(base, "other", settings(), overwrite=True), "holds no run, and is not overwritten"),
        (lambda: run(base, ".", settings(), overwrite=True), "would replace"),
        (lambda: run(base, "x", settings(), ExpertSelection({1: []})), "selection is empty"),
        (
            lambda: esft.train(str(folder / "no"), folder / "d.jsonl", folder / "x", settings(), SELECTION),
            "cannot load",
        ),
    ]
    for call, message in cases:
        with pytest.raises(esft.InputError, match=message):
            call()
        assert not (folder / "x").exists()


def test_a_run_is_kept_unless_overwritten(base):
    run(base, "run", settings(steps=1))
    with pytest.raises(esft.InputError, match="holds something already"):
        run(base, "run", settings(steps=1))
    run(base, "run", settings(steps=2), overwrite=True)
    assert len(losses(base.parent / "run")) == 2


def test_a_loss_that_is_not_finite_stops_the_run(base, monkeypatch):
    monkeypatch.setattr(train_module, "batch_loss", lambda model, _: (next(model.parameters()).sum() * torch.nan, 1))
    with pytest.raises(esft.InputError, match="step 1: loss nan"):
        run(base, "run", settings(method="full"), None)


def test_the_auxiliary_loss_is_off_by_default_and_falls_where_it_is_asked_for(base):
    selection = ExpertSelection({1: [2, 7], 2: [0]}, non_expert_modules=True)
    run(base, "plain", settings(steps=2), selection)
    run(base, "balanced", settings(steps=12, aux_loss=3.0), selection)
    plain, balanced = (
        [json.loads(line).get("aux_loss") for line in (base.parent / out / "metrics.jsonl").read_text().splitlines()]
        for out in ("plain", "balanced")
    )
    assert set(plain) == {None}
    curve = [value for value in balanced if value is not None]
    assert len(curve) == 12
    assert 2 < curve[-1] < curve[0] - 0.1  # two layers, each at least about 1

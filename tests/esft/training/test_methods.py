"""What each method trains of a model, and what it leaves on disk."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

import esft
from esft.checkpoint.digest import model_digest
from esft.checkpoint.load import load_model, load_tokenizer
from esft.experts.model_state import swapped_state
from esft.parallel.ranks import ALONE
from esft.runs.config import TrainConfig
from esft.selection import ExpertSelection
from esft.training.methods import METHODS, Source
from tests.esft.models import tiny_tokenizer
from tests.esft.small_runs import SELECTION, column, run, settings


def test_an_esft_run_stores_the_trained_experts_and_no_code_of_a_checkpoint_is_run_unasked(base, out):
    result = run(base, "run", settings(steps=1))
    tuned, stock = load_file(out / "adapter" / "adapter.safetensors"), load_file(base / "model.safetensors")
    assert tuned.keys() == {
        f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight"
        for layer, experts in SELECTION.experts.items()
        for expert in experts
        for part in ("gate", "up", "down")
    }
    assert not any(torch.equal(tensor, stock[name]) for name, tensor in tuned.items())
    assert result.trained_parameters == sum(tensor.numel() for tensor in tuned.values())
    assert (Source("m").trust_remote_code, Source("m").progress) == (False, False)


def test_full_fine_tuning_stores_the_whole_model_and_its_tokenizer_in_the_dtype_of_the_run(base, out):
    result = run(base, "run", settings(method="full", steps=1, dtype="bfloat16"), None)
    tensors, stock = load_file(out / "model" / "model.safetensors"), load_file(base / "model.safetensors")
    assert tensors.keys() == stock.keys()
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    assert result.trained_parameters == sum(t.numel() for t in stock.values())
    assert not (out / "experts.json").exists() and not (out / "adapter").exists()
    assert load_tokenizer(str(out / "model")).chat_template == tiny_tokenizer().chat_template
    run(base, "run", settings(method="full", steps=1, dtype="bfloat16"), None, resume=True)  # replaces what it stored


def test_a_lora_run_stores_what_peft_loads_with_its_base_and_is_the_same_for_one_seed(base, out):
    pytest.importorskip("peft")
    norms = {}
    for name, seed, noise in (("run", 0, 1), ("again", 0, 2), ("other", 1, 1)):
        torch.manual_seed(noise)
        # All records at once: the seed's order of the data is no difference.
        run(base, name, settings(method="lora", steps=1, seed=seed, batch_size=24, lora_rank=3, dtype="float32"), None)
        norms[name] = column(base.parent / name, "grad_norm")[0]
    assert norms["run"] == norms["again"] != pytest.approx(norms["other"], rel=1e-3)
    manifest = json.loads((out / "adapter" / "manifest.json").read_text())
    assert manifest["base_digest"] == model_digest(load_model(str(base)))
    assert manifest["chosen_by"] == {"lora_rank": 3}
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == 3
    assert config["target_modules"] == sorted(config["target_modules"]) and len(config["target_modules"]) > 9
    run(base, "run", None, None, resume=True)  # replaces what it stored


def prepared(base, config: TrainConfig, selection: ExpertSelection | None = None):
    return METHODS[config.method].prepare(Source(str(base)), config, selection)[0]


def trains(model) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_each_method_lets_train_what_it_says(base):
    full = prepared(base, TrainConfig(method="full"))
    assert trains(full) == {name for name, _ in full.named_parameters() if ".frozen_" not in name}
    assert all(p.numel() == 0 for name, p in full.named_parameters() if ".frozen_" in name)
    assert swapped_state(full).selection.experts == {1: list(range(8)), 2: list(range(8))}
    chosen = prepared(base, TrainConfig(), SELECTION)
    assert swapped_state(chosen).selection == SELECTION
    assert trains(chosen) == {
        f"model.layers.{layer}.mlp.experts.trained_{p}_proj" for layer in (1, 2) for p in ("gate_up", "down")
    }


def test_lora_is_asked_for_on_every_linear_layer_but_the_head_and_on_every_expert(base, monkeypatch):
    peft = pytest.importorskip("peft")
    monkeypatch.setattr(peft, "get_peft_model", lambda *asked: asked)
    stock, lora = prepared(base, TrainConfig(method="lora", lora_rank=3, lora_alpha=7))
    assert (lora.r, lora.lora_alpha, lora.task_type) == (3, 7, "CAUSAL_LM")
    linear = {name for name, module in stock.named_modules() if isinstance(module, torch.nn.Linear)}
    assert "lm_head" in linear and set(lora.target_modules) == linear - {"lm_head"}
    experts = {f"model.layers.{layer}.mlp.experts.{p}" for layer in (1, 2) for p in ("gate_up_proj", "down_proj")}
    assert type(lora.target_parameters) is list and set(lora.target_parameters) == experts  # what PEFT writes as JSON


@pytest.mark.parametrize("recompute", ["none", "frozen", "layers"])
def test_memory_is_saved_as_the_settings_say_and_on_the_backend_that_they_name(base, recompute: str):
    model = prepared(base, TrainConfig(recompute=recompute, backend="reference"), SELECTION)
    experts = model.get_submodule("model.layers.1.mlp.experts")
    assert (experts.recompute, experts.backend) == ("frozen" if recompute == "frozen" else "none", "reference")
    assert any(getattr(m, "gradient_checkpointing", False) for m in model.modules()) == (recompute == "layers")


def test_a_model_is_loaded_as_the_settings_say(base, monkeypatch):
    asked, model = [], prepared(base, TrainConfig(), SELECTION)
    monkeypatch.setattr("esft.training.methods.load", lambda *given: asked.append(given) or model)
    config = TrainConfig(
        frozen="nf4", dtype="float32", backend="reference", recompute="frozen", frozen_linear="int8", shard="experts"
    )
    for each, trust in ((config, True), (TrainConfig(), False)):
        METHODS["esft"].prepare(Source("m", trust, progress=trust), each, SELECTION)
    assert asked == [
        ("m", SELECTION, "nf4", "float32", "reference", "frozen", True, True, "int8", ALONE),
        ("m", SELECTION, "auto", "auto", "auto", "none", False, False, "bf16", ALONE),
    ]


@pytest.mark.parametrize("method", METHODS)
def test_a_model_that_cannot_make_its_layers_again_is_refused(base, monkeypatch, method: str):
    if method == "lora":
        pytest.importorskip("peft")
    asked = []

    def refuses(model):
        asked.append(model)
        raise ValueError("does not support it")

    monkeypatch.setattr("esft.training.methods.recompute_layers_of", refuses)
    with pytest.raises(esft.InputError, match="recompute layers: does not support it"):
        prepared(base, TrainConfig(method=method, recompute="layers"), SELECTION if method == "esft" else None)
    assert len(asked) == 1 and isinstance(asked[0], PreTrainedModel)


def test_lora_without_peft_says_what_to_install_before_it_loads_the_model(base, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setattr("esft.training.methods.load_model", None)
    with pytest.raises(esft.InputError, match="method lora needs the peft package: pip install 'esft\\[lora\\]'"):
        prepared(base, TrainConfig(method="lora"))

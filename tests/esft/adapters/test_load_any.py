"""Adapters of either kind, and what is wrong with one of PEFT's before PEFT reads it."""

import json
import sys

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import esft
from esft.adapters import load_any
from esft.adapters.load_any import PEFT_WEIGHTS, adapter_folder, load_any_adapter, load_with_adapter
from esft.adapters.merge import merge
from esft.checkpoint.load import load_model
from esft.experts.moe_layers import moe_layers
from esft.runs.config import TrainConfig
from esft.selection import ExpertSelection
from tests.esft.checkpoint.files import rewrite_json
from tests.esft.models import save_tiny, tiny_model, write_records

IDS = torch.arange(12).view(2, 6)


def test_a_folder_without_an_adapter_is_refused(tmp_path):
    with pytest.raises(esft.InputError, match="not an adapter folder"):
        load_any_adapter(tiny_model(), tmp_path)


def test_an_adapter_of_ours_is_loaded_into_the_model_itself(tmp_path):
    tuned = esft.swap(tiny_model(), ExpertSelection({1: [0]}, shared_experts=True))
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.5)
    esft.save_adapter(tuned, tmp_path / "a")
    model = tiny_model()
    assert load_any_adapter(model, str(tmp_path / "a")) is model
    torch.testing.assert_close(model(input_ids=IDS).logits, tuned(input_ids=IDS).logits, atol=2e-6, rtol=1e-5)


def save_lora(folder):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["o_proj"], init_lora_weights=False, lora_dropout=0.5)
    model = peft.get_peft_model(tiny_model(), config)
    model.save_pretrained(folder)
    return model


def test_an_adapters_experts_stay_exact_where_the_frozen_ones_are_in_few_bits(tmp_path):
    base = save_tiny(tmp_path / "base")
    tuned = esft.swap(load_model(str(base)), ExpertSelection({1: [0, 3]}))
    with torch.no_grad():
        moe_layers(tuned)[0].experts.trained_down_proj.mul_(1.5)
    esft.save_adapter(tuned, tmp_path / "a")
    loaded = load_with_adapter(str(base), tmp_path / "a", "int8")
    experts, wanted = (moe_layers(model)[0].experts for model in (loaded, tuned))
    assert [expert for expert in range(8) if not experts.is_packed(expert)] == [0, 3]
    for expert in (0, 3):
        assert all(map(torch.equal, experts.weights_of(expert), wanted.weights_of(expert)))
    alone = moe_layers(load_with_adapter(str(base), None, "int8"))[0].experts
    assert all(map(alone.is_packed, range(8)))


def test_a_peft_adapter_is_loaded_over_the_stock_model_of_which_no_expert_can_be_in_few_bits(tmp_path):
    base, lora = save_tiny(tmp_path / "base"), save_lora(tmp_path / "lora")
    for frozen in ("auto", "bf16"):
        loaded = load_with_adapter(str(base), tmp_path / "lora", frozen)
        torch.testing.assert_close(loaded(input_ids=IDS).logits, lora.eval()(input_ids=IDS).logits)
    for few_bits in ({"frozen": "int8"}, {"frozen_linear": "int8"}):
        with pytest.raises(esft.InputError, match="/lora: a PEFT adapter changes all experts, .* frozen in int8$"):
            load_with_adapter(str(base), tmp_path / "lora", **few_bits)


@pytest.mark.parametrize("trusted", [False, True])
def test_what_is_said_of_a_model_gets_to_what_loads_it(tmp_path, monkeypatch, trusted: bool):
    esft.save_adapter(esft.swap(tiny_model(), ExpertSelection({1: [0]}, shared_experts=True)), tmp_path / "a")
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    told: list[tuple] = []
    for name in ("load", "load_model", "load_skeleton"):
        monkeypatch.setattr(load_any, name, lambda *given, name=name: told.append((name, *given)) or tiny_model())
    monkeypatch.setattr(load_any, "load_any_adapter", lambda model, folder: model)
    options = ("bfloat16", "cpu", trusted, True, "bf16")
    for adapter in (None, tmp_path / "a", tmp_path / "lora"):
        load_with_adapter("m", adapter, "bf16", *options)
    rest = ("bf16", "bfloat16", "cpu", "none", trusted, True, "bf16")
    assert told == [
        ("load", "m", ExpertSelection({}), *rest),
        ("load_skeleton", "m", trusted),
        ("load", "m", ExpertSelection({1: [0]}), *rest),
        ("load_model", "m", "bfloat16", trusted),
    ]


def test_experts_stay_in_the_bits_that_a_checkpoint_ships_unless_said_otherwise(monkeypatch):
    told: list[tuple] = []
    monkeypatch.setattr(load_any, "load", lambda *given: told.append(given))
    load_with_adapter("m", None)
    assert told == [("m", ExpertSelection({}), "auto", "auto", "auto", "none", False, False, "bf16")]


def test_lora_adapters_load_through_peft(tmp_path):
    model = save_lora(tmp_path)
    loaded = load_any_adapter(tiny_model().train(), tmp_path)
    assert not loaded.training
    torch.testing.assert_close(loaded(input_ids=IDS).logits, model.eval()(input_ids=IDS).logits)


def test_a_lora_adapter_without_the_peft_package_says_what_to_install(tmp_path, monkeypatch):
    save_lora(tmp_path / "lora")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(esft.InputError, match=r"/lora: a PEFT adapter needs .* pip install 'esft\[lora\]'"):
        load_any_adapter(tiny_model(), tmp_path / "lora")


@pytest.mark.parametrize("kind", [OSError, ValueError, RuntimeError, TypeError, SafetensorError])
def test_whatever_peft_says_of_a_folder_is_said_in_one_line(tmp_path, monkeypatch, kind: type[Exception]):
    peft = pytest.importorskip("peft")
    save_lora(tmp_path / "lora")

    def fails(*_):
        raise kind("no good\nand here is why")

    monkeypatch.setattr(peft.PeftModel, "from_pretrained", fails)
    with pytest.raises(esft.InputError, match=r"/lora: cannot load this PEFT adapter \(no good\)$"):
        load_any_adapter(tiny_model(), tmp_path / "lora")


def test_a_lora_adapter_is_held_to_its_base_and_a_truncated_one_is_refused(tmp_path):
    pytest.importorskip("peft")
    base, other = save_tiny(tmp_path / "base"), save_tiny(tmp_path / "other", seed=1)
    write_records(tmp_path / "d.jsonl")
    config = TrainConfig(method="lora", steps=1, batch_size=4)
    esft.train(str(base), tmp_path / "d.jsonl", tmp_path / "run", config, progress=False)
    adapter = tmp_path / "run" / "adapter"
    load_any_adapter(load_model(str(base)), adapter)
    with pytest.raises(esft.InputError, match="made from another base"):
        load_any_adapter(load_model(str(other)), adapter)
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(esft.InputError, match="adapter_model.safetensors: not a readable safetensors file"):
        load_any_adapter(load_model(str(base)), adapter)


def change(folder, of) -> None:
    tensors = load_file(folder / PEFT_WEIGHTS)
    of(tensors)
    save_file(tensors, folder / PEFT_WEIGHTS, {"format": "pt"})


FIRST = "base_model.model.model.layers.0.self_attn.o_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t.update(foreign=torch.ones(2)), r"tensor foreign is of nothing that it adapts \(1 such in all\)$"),
        (lambda t: t.pop(FIRST), rf"tensor {FIRST} is missing \(1 such in all\)$"),
        (lambda t: t[FIRST].fill_(torch.nan), rf"tensor {FIRST} holds values that are infinite or no numbers$"),
        (lambda t: t[FIRST][0].fill_(-torch.inf), rf"tensor {FIRST} holds values that are infinite or no numbers$"),
        (lambda t: t.update({FIRST: torch.ones(1, 1)}), r"cannot load this PEFT adapter \(."),
        (lambda t: t.update({FIRST: t[FIRST].to(torch.int8)}), rf"tensor {FIRST} is I8, not floating point$"),
        (lambda t: t.update({FIRST: t[FIRST].to(torch.complex64)}), rf"tensor {FIRST} is C64, not floating point$"),
    ],
    ids=["foreign", "missing", "no number", "infinite", "another shape", "whole numbers", "complex"],
)
def test_a_peft_adapter_has_its_own_tensors_and_no_others(tmp_path, damage, message: str):
    save_lora(tmp_path)
    assert FIRST in load_file(tmp_path / PEFT_WEIGHTS)
    change(tmp_path, damage)
    with pytest.raises(esft.InputError, match=message):
        load_any_adapter(tiny_model(), tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "UNHEARD"}, r"adapter_config\.json: peft_type is 'UNHEARD'; PEFT has .*LORA"),
        ({"peft_type": None}, r"adapter_config\.json: peft_type is None"),
        ({"peft_type": ["LORA"]}, r"adapter_config\.json: peft_type is \['LORA'\]"),
        ({"peft_type": "PROMPT_TUNING"}, "a PROMPT_TUNING adapter of this kind is not supported; LoRA is"),
        ({"megatron_config": {"a": 1}, "megatron_core": "os"}, "a LORA adapter of this kind is not supported"),
        ({"r": "many"}, r"adapter_config\.json: r is 'many', not a number of at most 1,048,576"),
        ({"r": 10**9}, r"adapter_config\.json: r is 1000000000, not a number of at most"),
        ({"lora_alpha": 1e308}, r"adapter_config\.json: lora_alpha is 1e\+308, not a number of at most"),
        ({"lora_alpha": True}, r"adapter_config\.json: lora_alpha is True, not a number of at most"),
        ({"use_rslora": "x"}, r"adapter_config\.json: use_rslora is 'x', not true or false"),
        ({"fan_in_fan_out": 1}, r"adapter_config\.json: fan_in_fan_out is 1, not true or false"),
        ({"task_type": "SEQ_CLS"}, r"adapter_config\.json: task_type is 'SEQ_CLS'; only CAUSAL_LM is read"),
        ({"init_lora_weights": "pissa_niter_1000"}, r"pissa_niter_1000'; of iterations 999 are the most$"),
        ({"target_modules": ["absent"]}, r"cannot load this PEFT adapter \(."),
        ({"r": 500_000}, r"adapter_config\.json: has a rank of 500000, and no tensor has so many rows$"),
        ({"target_modules": "(a|a)*((a|[^!])+)+!"}, r"adapter_config\.json: target_modules '.*': it takes longer than"),
        ({"exclude_modules": "((.*)*)*!"}, r"adapter_config\.json: exclude_modules '.*': it takes longer than"),
        ({"rank_pattern": {"((.*)*)*!": 4}}, r"adapter_config\.json: rank_pattern \{.*: it takes longer than"),
        ({"alpha_pattern": {"(": 4}}, r"adapter_config\.json: alpha_pattern has a pattern that is none \("),
        ({"rank_pattern": {"o_proj": 10**9}}, r"adapter_config\.json: has a rank of 1000000000, and no tensor"),
    ],
    ids=str,
)
def test_a_peft_configuration_that_fits_nothing_is_named(tmp_path, monkeypatch, config: dict, message: str):
    monkeypatch.setattr(load_any, "MATCHING", 0.5)
    save_lora(tmp_path)
    rewrite_json(tmp_path / "adapter_config.json", lambda whole: whole.update(config))
    with pytest.raises(esft.InputError, match=message):
        load_any_adapter(tiny_model(), tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": r"(?i).*\.O_PROJ"},
        {"target_modules": r".*\.(?P<idx>\d+)\.self_attn\.o_proj"},
        {"alpha_pattern": {r"^model\.layers\.1\..*": 4}},
    ],
    ids=lambda config: next(iter(config)),
)
def test_patterns_that_peft_takes_are_taken(tmp_path, config: dict):
    saved = save_lora(tmp_path)
    rewrite_json(tmp_path / "adapter_config.json", lambda whole: whole.update(config))
    loaded = load_any_adapter(tiny_model(), tmp_path)
    names = {name for name, _ in saved.named_parameters() if "lora_" in name}
    assert names and {name for name, _ in loaded.named_parameters() if "lora_" in name} == names


@pytest.mark.parametrize("text", ["{", "[]", "null", '{"peft_type": "LORA", "peft_type": "IA3"}'])
def test_a_peft_configuration_that_is_none_is_named(tmp_path, text: str):
    save_lora(tmp_path)
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(esft.InputError, match=r"adapter_config\.json: "):
        load_any_adapter(tiny_model(), tmp_path)


def test_a_pickled_peft_adapter_is_never_loaded(tmp_path):
    save_lora(tmp_path)
    torch.save(load_file(tmp_path / PEFT_WEIGHTS), tmp_path / "adapter_model.bin")
    (tmp_path / PEFT_WEIGHTS).unlink()
    with pytest.raises(esft.InputError, match=rf"holds no {PEFT_WEIGHTS} \(pickled weights are never loaded\)$"):
        load_any_adapter(tiny_model(), tmp_path)


def test_a_runs_folder_stands_for_its_adapter(tmp_path):
    save_lora(tmp_path / "run" / "adapter")
    for path in ("run", "run/adapter"):
        assert adapter_folder(tmp_path / path) == tmp_path / "run" / "adapter"
    with pytest.raises(esft.InputError, match=r"absent: not an adapter folder \(no expert_cfg\.json\)$"):
        adapter_folder(tmp_path / "absent")
    assert load_any_adapter(tiny_model(), tmp_path / "run").peft_config


def test_a_peft_adapter_is_merged_as_the_error_says(tmp_path, monkeypatch):
    """The very line of the message, with its two names filled in."""
    monkeypatch.chdir(tmp_path)
    base, model = save_tiny(tmp_path / "base"), save_lora(tmp_path / "lora").eval()
    with pytest.raises(esft.InputError, match="a PEFT adapter, which PEFT itself merges: ") as refused:
        merge(base, tmp_path / "lora", tmp_path / "out")
    line = str(refused.value).partition("merges: ")[2].replace("BASE", repr(str(base))).replace("OUT", "'out'")
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    eval(line, {"PeftModel": PeftModel, "AutoModelForCausalLM": AutoModelForCausalLM})
    merged = load_model(str(tmp_path / "out"), "float32")
    torch.testing.assert_close(merged(input_ids=IDS).logits, model(input_ids=IDS).logits, atol=1e-4, rtol=1e-4)


def test_the_manifest_beside_a_peft_adapter_is_read_strictly(tmp_path):
    save_lora(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps({"format_version": True}))
    with pytest.raises(esft.InputError, match=r"manifest\.json: format_version must be 1 or 2, got True$"):
        load_any_adapter(tiny_model(), tmp_path)


def test_a_scale_may_be_a_fraction(tmp_path):
    save_lora(tmp_path)
    rewrite_json(tmp_path / "adapter_config.json", lambda whole: whole.update(lora_alpha=2.5, task_type=None))
    load_any_adapter(tiny_model(), tmp_path)


def test_a_name_that_no_folder_can_have_is_refused():
    for name in ("", "x" * 300, "a\0b"):
        with pytest.raises(esft.InputError, match="^[^\n]{0,200}$"):
            adapter_folder(name)


def test_a_manifest_that_cannot_be_read_is_no_missing_one(tmp_path):
    save_lora(tmp_path)
    load_any_adapter(tiny_model(), tmp_path)
    (tmp_path / "manifest.json").symlink_to("nowhere")
    with pytest.raises(esft.InputError, match=r"/manifest\.json: No such file or directory$"):
        load_any_adapter(tiny_model(), tmp_path)

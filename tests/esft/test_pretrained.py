"""What is saved of a swapped model is the stock model's checkpoint, and a swapped model reads it back."""

import copy
import gc
import weakref
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from esft.families import moe_layers
from esft.select import ExpertSelection
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.trainer_utils import load_sharded_checkpoint

import esft
from tests.esft import test_families as families
from tests.esft import zoo
from tests.esft.models import tiny_model, token_batch
from tests.esft.test_layout import listed

SELECTION = ExpertSelection({1: [5, 2], 2: [0]})


def swapped(tuned: bool = False, family: str = "deepseek_v2"):
    model = esft.swap(tiny_model(family), SELECTION)
    if tuned:
        families.tune(model)
    return model


def same_weights(model, other) -> bool:
    ours, theirs = model.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def files(folder) -> dict[str, bytes]:
    """Weights and index, byte by byte."""
    return {file.name: file.read_bytes() for file in folder.glob("model*")}


@pytest.mark.parametrize("family", families.FAMILIES)
def test_the_saved_files_are_the_stock_models_and_a_swapped_model_reads_them(family: str, tmp_path):
    model, other = zoo.tiny(family), zoo.tiny(family)
    everything = replace(families.selection(model), shared_experts=True, non_expert_modules=True)
    for m in (model, other):
        families.swapped(m, everything)
    families.tune(model)
    model.save_pretrained(tmp_path / "swapped")
    incompatible = other.load_state_dict(load_file(tmp_path / "swapped" / "model.safetensors"), strict=False)
    assert set(incompatible.missing_keys) <= {"lm_head.weight"}  # where it is the embedding
    assert not incompatible.unexpected_keys
    assert same_weights(other, model)
    esft.unswap(model).save_pretrained(tmp_path / "stock")
    assert files(tmp_path / "swapped") == files(tmp_path / "stock")


@pytest.mark.parametrize("family", ["deepseek_v2", "mixtral"])
def test_shards_have_the_stock_models_index_and_load_one_by_one(family: str, tmp_path):
    stock = tiny_model(family)
    stock.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32).eval()
    model, other = esft.swap(base, SELECTION), swapped(family=family)
    families.tune(model)
    expected = model(**token_batch()).logits
    model.save_pretrained(tmp_path / "swapped", max_shard_size="150KB")
    load_sharded_checkpoint(other, str(tmp_path / "swapped"), strict=False)
    assert same_weights(other, model)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "swapped", dtype=torch.float32).eval()
    torch.testing.assert_close(again(**token_batch()).logits, expected, atol=2e-6, rtol=1e-5)
    esft.unswap(model).save_pretrained(tmp_path / "stock", max_shard_size="150KB")
    assert files(tmp_path / "swapped") == files(tmp_path / "stock")
    assert len(files(tmp_path / "stock")) > 2


def run(folder, steps: int = 8, resume=None, **settings):
    """A model trained by transformers' Trainer, and the Trainer."""
    model = swapped().train()
    ids = torch.randint(0, 256, (32, 12), generator=torch.Generator().manual_seed(0)).tolist()
    data = Dataset.from_dict({"input_ids": ids, "labels": ids})
    settings = {"save_strategy": "steps", "save_steps": 4, "lr_scheduler_type": "constant"} | settings
    arguments = TrainingArguments(
        folder, max_steps=steps, learning_rate=3e-2, per_device_train_batch_size=4, use_cpu=True, report_to=[],
        disable_tqdm=True, logging_steps=1, **settings,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data.select(range(8)))
    trainer.train(resume_from_checkpoint=resume)
    return model, trainer


def test_a_resumed_trainer_goes_on_as_the_uninterrupted_one_and_its_checkpoints_are_stock(tmp_path, monkeypatch):
    loads = []
    monkeypatch.setattr(Trainer, "_issue_warnings_after_load", lambda self, result: loads.append(result))
    whole, uninterrupted = run(tmp_path / "whole")
    run(tmp_path / "broken", steps=4)
    resumed, trainer = run(tmp_path / "broken", resume=True)
    assert same_weights(resumed, whole)
    curves = [[e["loss"] for e in t.state.log_history if "loss" in e] for t in (uninterrupted, trainer)]
    assert curves[0] == curves[1] and len(curves[0]) == 8
    assert len(loads) == 1 and not any(loads[0])
    expected = whole.eval()(**token_batch()).logits
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "broken" / "checkpoint-8", dtype=torch.float32).eval()
    torch.testing.assert_close(stock(**token_batch()).logits, expected, atol=2e-6, rtol=1e-5)


def test_the_trainer_ends_with_its_best_model(tmp_path):
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1, "save_steps": 1}
    model, trainer = run(tmp_path, steps=3, metric_for_best_model="loss", greater_is_better=True, **best)  # the worst
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")
    last, found = swapped(), swapped()
    for other, step in ((found, 1), (last, 3)):
        other.load_state_dict(load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors"))
    assert same_weights(model, found) and not same_weights(model, last)


def test_a_swapped_models_own_state_keeps_its_names_and_loads(tmp_path):
    from accelerate import Accelerator

    model, other = swapped(tuned=True), swapped()
    assert model.state_dict().keys() == dict(model.named_parameters()).keys()
    torch.save(model.state_dict(), tmp_path / "state.pt")
    other.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert same_weights(other, model)

    accelerator = Accelerator(cpu=True)
    other = accelerator.prepare(swapped(tuned=True))
    accelerator.save_state(tmp_path / "state")
    with torch.no_grad():
        moe_layers(other)[0].experts.trained_down_proj.zero_()
    accelerator.load_state(tmp_path / "state")
    assert same_weights(accelerator.unwrap_model(other), model)


def test_a_stock_models_state_loads_into_a_swapped_one():
    stock, model = tiny_model(seed=1), swapped()
    expected = stock(**token_batch()).logits
    model.load_state_dict(stock.state_dict())
    torch.testing.assert_close(model(**token_batch()).logits, expected, atol=2e-6, rtol=1e-5)


def test_a_copy_saves_itself_and_unswap_leaves_nothing_behind(tmp_path):
    model = swapped()
    other = copy.deepcopy(model)
    families.tune(other)
    other.save_pretrained(tmp_path / "copy")
    model.load_state_dict(load_file(tmp_path / "copy" / "model.safetensors"))
    assert same_weights(model, other)
    before = vars(tiny_model()).keys()
    for m in (model, other):
        esft.unswap(m)
        assert vars(m).keys() - before <= {"esft_expert_tensors", "esft_conversions"}  # found once, and kept
        assert not m._load_state_dict_pre_hooks


def test_a_swapped_model_is_freed_at_once():
    model = swapped()
    alive = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert alive() is None
    finally:
        gc.enable()


def test_a_state_that_was_collected_elsewhere_is_saved_and_one_that_is_not_whole_is_refused(tmp_path):
    model = swapped(tuned=True)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "given", state_dict=state)
    model.save_pretrained(tmp_path / "own")
    assert files(tmp_path / "given") == files(tmp_path / "own")
    model.save_pretrained(tmp_path / "other_rank", is_main_process=False)
    assert not files(tmp_path / "other_rank")
    frozen = "model.layers.1.mlp.experts.frozen_down_proj"
    for change, message in (
        ({frozen: torch.empty(0)}, "a part of the experts is elsewhere"),  # as ZeRO-3 leaves it on every rank
        ({"module." + frozen: state[frozen]}, f"module.{frozen}: the model has no such tensor"),
    ):
        with pytest.raises(esft.InputError, match=message):
            model.save_pretrained(tmp_path / "refused", state_dict=state | change)
    with pytest.raises(esft.InputError, match="spread over ranks cannot be saved"):
        model.save_pretrained(tmp_path / "refused", distributed_checkpoint=True)
    assert not files(tmp_path / "refused")


def test_a_sharded_model_is_saved_once_its_state_is_collected(tmp_path):
    import torch.distributed as dist
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import fully_shard

    model = swapped(tuned=True)
    model.save_pretrained(tmp_path / "whole")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        fully_shard(model, mesh=dist.init_device_mesh("cpu", (1,)))
        with pytest.raises(esft.InputError, match="a part of the experts is elsewhere .* collect the state"):
            model.save_pretrained(tmp_path / "sharded")
        with pytest.raises(esft.InputError, match="a part of the experts is elsewhere .* load the checkpoint before"):
            model.load_state_dict(load_file(tmp_path / "whole" / "model.safetensors"))
        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        model.save_pretrained(tmp_path / "sharded", state_dict=state)
    finally:
        dist.destroy_process_group()
    assert files(tmp_path / "sharded") == files(tmp_path / "whole")


def test_a_checkpoint_that_does_not_fit_is_an_error_or_its_gaps_are_reported(tmp_path):
    model = swapped(tuned=True)
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.experts.5.up_proj.weight"
    with pytest.raises(esft.InputError, match=rf"{name}: has shape \(3, 32\), the model's has \(20, 32\)"):
        swapped().load_state_dict(state | {name: state[name][:3]})
    with pytest.raises(RuntimeError, match="Missing key.*layers.1.mlp.experts.trained_gate_up_proj"):
        swapped().load_state_dict({n: t for n, t in state.items() if n != name})
    with pytest.raises(RuntimeError, match='Unexpected key.*"other"'):
        swapped().load_state_dict(state | {"other": torch.ones(1)})


def test_experts_in_a_module_list_save_and_load_as_they_always_did(tmp_path):
    model = listed(tiny_model())
    with pytest.warns(UserWarning, match="they are a ModuleList"):
        esft.swap(model, SELECTION)
    families.tune(model)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    expected = model(**token_batch()).logits
    torch.testing.assert_close(again(**token_batch()).logits, expected, atol=2e-6, rtol=1e-5)


def test_beside_lora_each_saves_its_own_and_the_merged_model_all(tmp_path):
    model = swapped(tuned=True)
    both = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    expected = both.eval()(**token_batch()).logits
    both.save_pretrained(tmp_path / "lora")
    assert all(".lora_" in name for name in load_file(tmp_path / "lora" / "adapter_model.safetensors"))
    merged = both.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    torch.testing.assert_close(again(**token_batch()).logits, expected, atol=2e-6, rtol=1e-5)

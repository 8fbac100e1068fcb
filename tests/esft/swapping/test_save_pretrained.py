"""What is saved of a swapped model is the stock model's checkpoint, and a swapped model reads it back."""

import copy
import gc
import weakref

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.trainer_utils import load_sharded_checkpoint

import esft
from esft.checkpoint.load import load_model
from esft.experts.moe_layers import moe_layers
from esft.selection import ExpertSelection
from esft.swapping.save_pretrained import detach, stock_state
from tests.esft import test_multimodal as multimodal
from tests.esft import zoo
from tests.esft.checkpoint.packed import fp8_checkpoint
from tests.esft.experts import test_moe_layers as families
from tests.esft.experts.test_stock_layout import listed
from tests.esft.models import FAMILIES, tiny_model, token_batch
from tests.esft.swapping.models import SELECTION, swapped


def same_weights(model, other) -> bool:
    ours, theirs = model.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def files(folder) -> dict[str, bytes]:
    """Weights and index, byte by byte."""
    return {file.name: file.read_bytes() for file in folder.glob("model*")}


@pytest.mark.parametrize("family", families.FAMILIES)
def test_the_saved_files_are_the_stock_models_and_a_swapped_model_reads_them(family: str, tmp_path):
    model, other = zoo.tiny(family), zoo.tiny(family)
    everything = families.with_all_else(model)
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


def test_frozen_experts_that_came_in_few_bits_are_saved_as_they_read(tmp_path):
    base = fp8_checkpoint(tmp_path / "base")
    model = esft.load(str(base), SELECTION)
    model.save_pretrained(tmp_path / "saved")
    stock = load_model(str(base)).state_dict()
    saved = load_model(str(tmp_path / "saved")).state_dict()
    assert saved.keys() == stock.keys() and all(torch.equal(tensor, stock[name]) for name, tensor in saved.items())


def test_while_it_is_saved_a_model_has_the_stock_models_parameters_of_experts_their_shapes(tmp_path, monkeypatch):
    model, seen = swapped(), {}
    names = ("lm_head.weight", "model.layers.1.mlp.experts.down_proj")
    monkeypatch.setattr(
        type(model), "save_pretrained", lambda self, *_, **__: seen.update({n: self.get_parameter(n) for n in names})
    )
    model.save_pretrained(tmp_path)
    assert seen[names[0]] is model.lm_head.weight and seen[names[1]].shape == (8, 32, 20)
    with pytest.raises(AttributeError):
        model.get_parameter(names[1])


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
        assert vars(m).keys() - before == {"esft_state"}  # for what was found once
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


def test_a_sharded_model_saves_itself_or_its_state_once_that_is_collected(tmp_path):
    import torch.distributed as dist
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import fully_shard

    model = swapped(tuned=True)
    model.save_pretrained(tmp_path / "whole")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        fully_shard(model, mesh=dist.init_device_mesh("cpu", (1,)))
        model.save_pretrained(tmp_path / "itself")
        with pytest.raises(esft.InputError, match="is saved without further arguments"):
            model.save_pretrained(tmp_path / "refused", max_shard_size="1GB")
        with pytest.raises(esft.InputError, match="a part of the experts is elsewhere .* load the checkpoint before"):
            model.load_state_dict(load_file(tmp_path / "whole" / "model.safetensors"))
        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        model.save_pretrained(tmp_path / "sharded", state_dict=state)
    finally:
        dist.destroy_process_group()
    assert files(tmp_path / "sharded") == files(tmp_path / "whole") == files(tmp_path / "itself")


def test_experts_in_a_module_list_save_and_load_as_they_always_did(tmp_path):
    model = listed(tiny_model())
    with pytest.warns(UserWarning, match="they are a ModuleList"):
        esft.swap(model, SELECTION)
    families.tune(model)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    expected = model(**token_batch()).logits
    torch.testing.assert_close(again(**token_batch()).logits, expected, atol=2e-6, rtol=1e-5)
    with pytest.raises(RuntimeError, match='Unexpected key.*"other"'):
        model.load_state_dict(model.state_dict() | {"other": torch.ones(1)})


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


def refuse(*_):
    raise AssertionError("experts were copied")


def test_a_lora_of_transformers_own_is_saved_alone_and_without_a_copy_of_the_experts(tmp_path, monkeypatch):
    model = swapped(tuned=True)
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    monkeypatch.setattr("esft.swapping.save_pretrained.stock_state", refuse)
    model.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.glob("*.safetensors")} == {"adapter_model.safetensors"}
    assert all(".lora_" in name for name in load_file(tmp_path / "adapter_model.safetensors"))


def test_a_process_that_does_not_write_copies_nothing(tmp_path, monkeypatch):
    model = swapped()
    monkeypatch.setattr("esft.swapping.save_pretrained.stock_state", refuse)
    model.save_pretrained(tmp_path, False)
    assert not files(tmp_path)


def test_arguments_by_position_are_those_of_transformers(tmp_path):
    model = swapped(tuned=True)
    model.save_pretrained(tmp_path / "expected")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    families.tune(model)  # the state that is given is saved, and not the model's own
    model.save_pretrained(tmp_path / "given", True, state)
    assert files(tmp_path / "given") == files(tmp_path / "expected")


@pytest.mark.parametrize("trouble", ["", "spread by transformers", "elsewhere"])
def test_saving_leaves_nothing_on_the_model_even_where_it_fails(tmp_path, trouble: str):
    model = swapped()
    before, names = vars(model).keys(), list(model.state_dict())
    if trouble == "elsewhere":
        moe_layers(model)[1].experts.frozen_down_proj = torch.nn.Parameter(torch.empty(0), requires_grad=False)
        with pytest.raises(esft.InputError, match="^model.layers.2.mlp.experts: a part of the experts is elsewhere"):
            model.save_pretrained(tmp_path)
    elif trouble:
        model.config.distributed_config = object()
        with pytest.raises(esft.InputError, match="a swapped model that transformers has spread over ranks cannot be"):
            model.save_pretrained(tmp_path)
    else:
        model.save_pretrained(tmp_path)
    assert vars(model).keys() <= before
    assert list(model.state_dict()) == names
    assert not model._state_dict_hooks


@pytest.mark.parametrize("family", ["deepseek_v2", "gpt_oss"])
def test_a_state_as_the_stock_model_has_it_keeps_names_shapes_and_order_and_copies_experts_alone(family: str):
    model, stock = (tiny_model() if family in FAMILIES else zoo.tiny(family) for _ in range(2))
    esft.swap(model, SELECTION if family in FAMILIES else families.selection(model))
    found, own = stock_state(model, model.state_dict()), model.state_dict()
    expected = stock.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    assert all(found[name].data_ptr() == tensor.data_ptr() for name, tensor in own.items() if name in found)


def test_a_state_that_lacks_a_pool_or_holds_one_of_no_layer_is_refused_with_its_name():
    model = swapped()
    state = dict(model.state_dict())
    pool = "model.layers.1.mlp.experts.trained_down_proj"
    lacking = {name: tensor for name, tensor in state.items() if name != pool}
    for wrong in (lacking, state | {pool: state[pool][:1]}, state | {pool: state[pool].new_empty(0)}):
        with pytest.raises(esft.InputError, match="^model.layers.1.mlp.experts: a part of the experts is elsewhere"):
            stock_state(model, wrong)
    with pytest.raises(esft.InputError, match="^other.trained_down_proj: the model has no such tensor"):
        stock_state(model, state | {"other.trained_down_proj": state[pool]})


def test_detaching_what_was_never_attached_is_nothing():
    model = tiny_model()
    before = set(vars(model))
    detach(model)
    assert set(vars(model)) == before


def test_files_whose_form_only_the_shape_tells_are_saved_in_the_stock_models(tmp_path):
    model = esft.swap(multimodal.tiny(), ExpertSelection({0: [3], 1: [5, 0]}))
    families.tune(model)
    model.save_pretrained(tmp_path / "swapped")
    esft.unswap(model).save_pretrained(tmp_path / "stock")
    assert files(tmp_path / "swapped") == files(tmp_path / "stock")


def test_a_model_that_nobody_else_holds_saves_itself(tmp_path):
    model = swapped(tuned=True)
    model.save_pretrained(tmp_path / "held")
    alive = [weakref.ref(each) for each in (model, model.lm_head)]
    gc.disable()
    try:
        save = model.save_pretrained
        del model
        assert alive[0]() is None
        save(tmp_path / "alone")
        save(tmp_path / "again")
        del save
        assert alive[1]() is None
    finally:
        gc.enable()
    assert files(tmp_path / "held") == files(tmp_path / "alone") == files(tmp_path / "again")
    swapped(tuned=True).save_pretrained(tmp_path / "at once")
    assert files(tmp_path / "held") == files(tmp_path / "at once")

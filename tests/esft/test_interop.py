"""The libraries that a model is trained and served with, each used for real on a swapped model."""

import copy

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import esft
from esft.checkpoint.load import load_model
from esft.experts.moe_layers import moe_layers
from esft.selection import ExpertSelection
from tests.esft.models import chat, save_tiny, tiny_model, tiny_tokenizer, token_batch

SELECTION = ExpertSelection({1: [5, 2], 2: [0]})
QUIET = {"use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1}


def swapped(**settings):
    return esft.swap(tiny_model(**settings), SELECTION).train()


def snapshot(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def moved(model, before: dict[str, torch.Tensor]) -> set[str]:
    """Which parameters have changed, by the kind of pool or ``other``."""
    names = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
    return {next((pool for pool in ("trained", "frozen") if f".{pool}_" in n), "other") for n in names}


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def gradients(model) -> dict[str, torch.Tensor]:
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None and p.numel()}


def step(model, **inputs) -> dict[str, torch.Tensor]:
    model(**token_batch(), use_cache=False, **inputs).logits.float().square().mean().backward()
    return gradients(model)


def test_transformers_trainer_trains_the_selected_experts_only(tmp_path):
    model = swapped()
    before = snapshot(model)
    ids = torch.randint(0, 256, (8, 12), generator=torch.Generator().manual_seed(0)).tolist()
    data = Dataset.from_dict({"input_ids": ids, "labels": ids})
    arguments = TrainingArguments(tmp_path, max_steps=6, learning_rate=3e-2, per_device_train_batch_size=8, **QUIET)
    trainer = Trainer(model, arguments, train_dataset=data)
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0] - 0.1
    assert moved(model, before) == {"trained"}


def test_trl_sft_trainer_trains_the_selected_experts_only(tmp_path):
    trl = pytest.importorskip("trl", reason="TRL needs Python 3.11")
    model = swapped()
    before = snapshot(model)
    data = Dataset.from_list([{"messages": chat(f"say {letter}", letter * 3)} for letter in "abcdefgh"])
    arguments = trl.SFTConfig(
        str(tmp_path),
        max_steps=6,
        learning_rate=3e-2,
        per_device_train_batch_size=8,
        max_length=48,
        bf16=False,
        **QUIET | {"save_strategy": "steps", "save_steps": 6},
    )
    trainer = trl.SFTTrainer(model, args=arguments, train_dataset=data, processing_class=tiny_tokenizer())
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0] - 0.1
    assert moved(model, before) == {"trained"}
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-6", dtype=torch.float32).eval()
    expected = model.eval()(**token_batch()).logits
    torch.testing.assert_close(saved(**token_batch()).logits, expected, atol=2e-6, rtol=1e-5)


def test_accelerate_prepares_and_steps_it():
    from accelerate import Accelerator

    model = swapped()
    before = snapshot(model)
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    accelerator.backward(prepared(**token_batch()).logits.square().mean())
    accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
    optimizer.step()
    assert moved(accelerator.unwrap_model(prepared), before) == {"trained"}


@pytest.mark.parametrize("recompute", ["none", "frozen"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant: bool, recompute: str):
    plain, saving = swapped(), esft.swap(tiny_model(), SELECTION, recompute=recompute).train()
    saving.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        saving.enable_input_require_grads()  # as transformers asks for where the embedding is frozen
    expected, found = step(plain), step(saving)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("recompute", ["none", "frozen"])
def test_torch_compile_sees_one_opaque_node_a_layer_and_gives_the_same_gradients(recompute: str):
    torch._dynamo.reset()
    nodes: list[str] = []

    def backend(graph, inputs):
        nodes.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    plain, compiled = swapped(), esft.swap(tiny_model(), SELECTION, recompute=recompute).train()
    expected = step(plain)
    step(torch.compile(compiled, backend=backend, fullgraph=True))
    assert [node for node in nodes if "esft" in node] == ["esft.routed_mlp"] * 2
    found = gradients(compiled)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-7, rtol=1e-5)


def test_the_esft_experts_implementation_compiles_without_a_graph_break():
    torch._dynamo.reset()
    model = tiny_model()
    expected = model(**token_batch()).logits
    model.set_experts_implementation("esft")
    found = torch.compile(model, backend="aot_eager", fullgraph=True)(**token_batch(), use_cache=False).logits
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)


def test_generate_with_a_cache_gives_the_tuned_stock_models_tokens():
    model = swapped().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(2.0)
    prompt = {"input_ids": torch.tensor([[256, 5, 9, 33]]), "max_new_tokens": 12, "do_sample": False}
    found = model.generate(**prompt)
    assert torch.equal(found, model.generate(**prompt, use_cache=False))
    assert torch.equal(found, esft.unswap(model).generate(**prompt))


def test_save_pretrained_after_unswap_loads_in_stock_transformers(tmp_path):
    model = swapped().eval()
    with torch.no_grad():
        moe_layers(model)[0].experts.trained_down_proj.mul_(2.0)
    expected = model(**token_batch()).logits
    esft.unswap(model).save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    torch.testing.assert_close(again(**token_batch()).logits, expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_trains_weights_of_either_dtype(dtype: torch.dtype):
    selection = ExpertSelection({2: [5, 2]})
    stock, model = tiny_model(dtype=dtype).train(), esft.swap(tiny_model(dtype=dtype), selection).train()
    stock.set_experts_implementation("eager")
    with torch.autocast("cpu", torch.bfloat16):
        step(stock)
        found = step(model)
    experts = moe_layers(stock)[-1].experts
    assert len(found) == 2
    for name, gradient in zip(("gate_up_proj", "down_proj"), found.values(), strict=True):
        expected = getattr(experts, name).grad[[5, 2]]
        assert gradient.dtype == dtype
        # Two layers of bfloat16 either way: the stock experts round what ours keep, some ten roundings lie between.
        assert (gradient - expected).norm() <= 10 * torch.finfo(torch.bfloat16).eps * expected.norm()


def test_a_model_placed_by_device_map_swaps_and_trains(tmp_path):
    save_tiny(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", device_map={"": "cpu"}, dtype=torch.float32)
    expected = step(esft.swap(load_model(str(tmp_path / "base")), SELECTION))
    found = step(esft.swap(model, SELECTION))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


def test_a_model_whose_weights_are_offloaded_is_refused_before_anything_is_touched(tmp_path):
    save_tiny(tmp_path / "base")
    placement = {"model.layers.1": "disk", "model.layers.2": "cpu", "model.layers.0": "cpu"}
    placement |= {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", device_map=placement, offload_folder=tmp_path / "offload", dtype=torch.float32
    )
    before = model(**token_batch()).logits
    with pytest.raises(esft.InputError, match=r"model.layers.1.mlp.experts: .* not in memory"):
        esft.swap(model, SELECTION)
    assert torch.equal(model(**token_batch()).logits, before)


def test_lora_on_attention_trains_beside_the_experts_and_each_saves_its_own(tmp_path):
    model = swapped()
    lora = LoraConfig(r=2, target_modules=["q_proj", "o_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    both = get_peft_model(model, lora)
    esft.thaw(model)  # PEFT has frozen everything but its own
    before = snapshot(both)
    optimizer = torch.optim.AdamW([p for p in both.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        both(**token_batch()).logits.square().mean().backward()
        optimizer.step()
    changed = {n for n, p in both.named_parameters() if not torch.equal(p, before[n])}
    assert changed and all(".lora_" in n or ".trained_" in n for n in changed)
    assert {".lora_" in n for n in changed} == {True, False}
    tuned = both.eval()(**token_batch()).logits
    esft.save_adapter(model, tmp_path / "esft")
    esft.unswap(model)
    torch.testing.assert_close(both(**token_batch()).logits, tuned, atol=2e-6, rtol=1e-5)
    both.save_pretrained(tmp_path / "lora")
    again = PeftModel.from_pretrained(esft.load_adapter(tiny_model(), tmp_path / "esft"), tmp_path / "lora").eval()
    torch.testing.assert_close(again(**token_batch()).logits, tuned, atol=2e-6, rtol=1e-5)


def test_the_stock_auxiliary_loss_is_off_by_default_and_the_same_when_asked_for():
    stock, ours = tiny_model("qwen3_moe"), esft.swap(tiny_model("qwen3_moe"), SELECTION)
    batch = token_batch()
    labels = batch["input_ids"]
    plain = ours(**batch, labels=labels).loss
    assert torch.equal(plain, copy.deepcopy(ours)(**batch, labels=labels, output_router_logits=False).loss)
    expected, found = (m(**batch, labels=labels, output_router_logits=True) for m in (stock, ours))
    torch.testing.assert_close(found.aux_loss, expected.aux_loss)
    torch.testing.assert_close(found.loss, expected.loss, atol=1e-6, rtol=1e-6)
    assert found.loss > plain

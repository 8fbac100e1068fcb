import gc
import weakref

import pytest
import torch
from esft.families import moe_layers
from esft.layout import Layout
from esft.select import ExpertSelection
from esft.swap import swap_state

import esft
from esft.moe import Experts
from tests.esft.models import FAMILIES, tiny_model, token_batch

TRAINED = [5, 2]


def selection_for(family: str, **more) -> ExpertSelection:
    first = FAMILIES[family][1]
    return ExpertSelection({first: TRAINED, 2: [0]}, **more)


def logits(model) -> torch.Tensor:
    return model(**token_batch()).logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_swapped_logits_equal_the_stock_models(family: str, backend: str):
    model = tiny_model(family)
    stock = logits(model)
    esft.swap(model, selection_for(family), backend=backend)
    torch.testing.assert_close(logits(model), stock, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_those_of_the_stock_model_in_the_selected_experts_only(family: str):
    stock, swapped = tiny_model(family).double(), tiny_model(family).double()
    stock.set_experts_implementation("eager")  # the only one that computes in float64
    esft.swap(swapped, selection_for(family), backend="cpu")
    for model in (stock, swapped):
        logits(model).square().mean().backward()
    theirs, ours = moe_layers(stock), moe_layers(swapped)
    for their, our in zip(theirs, ours, strict=True):
        chosen = list(our.experts.trained)
        for name, pool in (("gate_up_proj", "trained_gate_up_proj"), ("down_proj", "trained_down_proj")):
            gradient = getattr(our.experts, pool).grad
            expected = getattr(their.experts, name).grad[chosen]
            if chosen:
                # All families' routers weigh in float32, so float64 does not get closer than this.
                assert (gradient - expected).abs().max() <= 1e-6 * expected.abs().max()
        assert our.experts.frozen_gate_up_proj.grad is None
    with_gradient = {n for n, p in swapped.named_parameters() if p.grad is not None and p.numel()}
    assert all(".experts.trained_" in name for name in with_gradient)
    assert with_gradient


def test_shared_experts_and_non_expert_modules_train_when_the_selection_says_so():
    model = esft.swap(tiny_model(), ExpertSelection({1: [0]}, shared_experts=True))
    trained = {n for n, p in model.named_parameters() if p.requires_grad and p.numel()}
    assert "model.layers.1.mlp.shared_experts.up_proj.weight" in trained
    assert not any("self_attn" in n or "embed" in n for n in trained)

    model = esft.swap(tiny_model(), ExpertSelection({1: [0]}, non_expert_modules=True))
    trained = {n for n, p in model.named_parameters() if p.requires_grad and p.numel()}
    assert "model.layers.0.self_attn.o_proj.weight" in trained
    assert "model.layers.1.mlp.gate.weight" in trained
    assert not any("shared_experts" in n or "frozen" in n for n in trained)


def test_no_gradient_goes_below_the_lowest_trained_layer():
    model = esft.swap(tiny_model(), ExpertSelection({2: [0]}))
    needed = {}
    for layer in moe_layers(model):
        layer.experts.register_forward_hook(lambda _, args, out, i=layer.index: needed.update({i: out.requires_grad}))
    logits(model)
    assert needed == {1: False, 2: True}


@pytest.mark.parametrize("family", FAMILIES)
def test_unswap_gives_the_stock_modules_back_with_tuned_weights(family: str):
    model = tiny_model(family)
    names = [n for n, _ in model.named_parameters()]
    required = [p.requires_grad for p in model.parameters()]
    types = [type(layer.experts) for layer in moe_layers(model)]
    esft.swap(model, selection_for(family))
    with torch.no_grad():
        moe_layers(model)[0].experts.trained_down_proj.mul_(1.5)
    tuned = logits(model)
    esft.unswap(model)
    assert [n for n, _ in model.named_parameters()] == names
    assert [p.requires_grad for p in model.parameters()] == required
    assert [type(layer.experts) for layer in moe_layers(model)] == types
    torch.testing.assert_close(logits(model), tuned, atol=2e-6, rtol=1e-5)


def test_generate_with_cache_gives_the_stock_models_tokens():
    model = tiny_model()
    prompt = {"input_ids": torch.tensor([[256, 5, 9, 33]]), "max_new_tokens": 12, "do_sample": False}
    expected = model.generate(**prompt)
    assert torch.equal(esft.swap(model, ExpertSelection({})).generate(**prompt), expected)


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        ({0: [1]}, "selection names layer 0; the model's MoE layers are [1, 2]"),
        ({1: [8]}, "selection names experts [8] of layer 1, which has 8 experts"),
        ({1: [3, 3]}, "selection names an expert of layer 1 twice"),
    ],
)
def test_a_selection_that_does_not_fit_changes_nothing(experts: dict, message: str):
    model = tiny_model()
    before = logits(model)
    with pytest.raises(esft.InputError, match=message.replace("[", r"\[").replace("]", r"\]")):
        esft.swap(model, ExpertSelection(experts))
    assert torch.equal(logits(model), before)
    assert all(p.requires_grad for p in model.parameters())


def test_a_model_without_moe_layers_is_refused():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(esft.InputError, match="LlamaForCausalLM has no MoE layers"):
        esft.swap(LlamaForCausalLM(config), ExpertSelection({}))


def test_swapping_twice_and_unswapping_a_stock_model_are_refused():
    model = esft.swap(tiny_model(), ExpertSelection({}))
    with pytest.raises(esft.InputError, match="swapped already"):
        esft.swap(model, ExpertSelection({}))
    with pytest.raises(esft.InputError, match="not swapped"):
        esft.unswap(tiny_model())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: e.register_parameter("down_proj", None), "down_proj: experts of NoneType are not supported"),
        (
            lambda e: setattr(e, "gate_up_proj", torch.nn.Parameter(e.gate_up_proj.to(torch.float8_e4m3fn))),
            "gate_up_proj: experts of torch.float8_e4m3fn are not supported",
        ),
        (
            lambda e: setattr(e, "gate_up_proj", torch.nn.Parameter(e.gate_up_proj[:, 1:])),
            r"gate_up_proj: has shape \(8, 39, 32\), not \(8, 40, 32\) as down_proj has it",
        ),
        (lambda e: setattr(e, "_is_expert_parallel", True), "spread over ranks"),
    ],
)
def test_experts_in_a_layout_that_is_not_supported_are_refused_before_anything_is_touched(change, message: str):
    model = tiny_model()
    change(moe_layers(model)[1].experts)
    with pytest.raises(esft.InputError, match=message):
        esft.swap(model, ExpertSelection({}))
    assert moe_layers(model)[0].experts.gate_up_proj.numel()
    assert all(p.requires_grad for p in model.parameters())


def test_a_backend_that_cannot_run_here_is_refused(monkeypatch):
    model = tiny_model()
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for backend, message in (("gpu", "backend must be one of"), ("triton", "TRITON_INTERPRET=1")):
        with pytest.raises(esft.InputError, match=message):
            esft.swap(model, ExpertSelection({}), backend)
    assert all(layer.experts.gate_up_proj.numel() for layer in moe_layers(model))


def test_a_swap_that_fails_halfway_leaves_the_stock_model(monkeypatch):
    model, batch = tiny_model(), token_batch()
    with torch.no_grad():
        before = model(**batch).logits
    grads = {name: p.requires_grad for name, p in model.named_parameters()}
    real, made = Layout.swapped, []

    def fails_at_the_second(self, *args, **kwargs):
        made.append(self)
        if len(made) == 2:
            raise torch.OutOfMemoryError("no memory left")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Layout, "swapped", fails_at_the_second)
    with pytest.raises(torch.OutOfMemoryError):
        esft.swap(model, ExpertSelection({1: [0]}))
    assert swap_state(model) is None and len(made) == 2
    assert grads == {name: p.requires_grad for name, p in model.named_parameters()}
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, before)


def test_unswap_holds_one_layers_pools_at_a_time(monkeypatch):
    model = esft.swap(tiny_model(), ExpertSelection({1: [0], 2: [3]}))
    pools = [weakref.ref(layer.experts) for layer in moe_layers(model)]
    alive: list[int] = []
    real = Experts.stacked

    def counted(self):
        gc.collect()
        alive.append(sum(ref() is not None for ref in pools))
        return real(self)

    monkeypatch.setattr(Experts, "stacked", counted)
    esft.unswap(model)
    assert alive == list(range(len(pools), 0, -1))

"""Attention over short rows gives what the fused one gives, and keeps nothing that grows with the square of the row."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedModel

from esft import short_attention
from esft.short_attention import NAME, use_short_attention
from tests.esft import zoo
from tests.esft.models import tiny_model

LENGTH = 12
# With inputs of several kinds, or without a head for text: not what is trained here.
OTHERS = ["qwen3_omni_moe:Qwen3OmniMoeTalkerTextExperts"]


@pytest.fixture
def plain(monkeypatch):
    """The lengths of the rows for which the plain attention was computed, in the order of the layers."""
    kept, checkpoint = [], short_attention.checkpoint

    def watched(function, module, query, *rest, **options):
        kept.append(query.shape[2])
        return checkpoint(function, module, query, *rest, **options)

    monkeypatch.setattr(short_attention, "checkpoint", watched)
    return kept


def step(model: PreTrainedModel, **inputs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Last hidden states of the tokens that are no padding, and the gradients of their squares' mean."""
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    out = model.base_model(**inputs, use_cache=False)[0][mask]
    out.float().square().mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return out.detach(), gradients


@pytest.mark.parametrize("family", [family for family in zoo.families() if family not in OTHERS])
def test_every_family_computes_what_it_computes_with_fused_attention(family: str):
    model = zoo.tiny(family)
    ids = zoo.tokens(2, LENGTH)
    padded = torch.ones_like(ids)
    padded[1, LENGTH // 2 :] = 0
    inputs = {"input_ids": ids, "attention_mask": padded}
    before, expected = step(model, **inputs)
    use_short_attention(model)
    after, found = step(model, **inputs)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    assert found.keys() == expected.keys()
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5 * scale, msg=name)


def test_documents_of_a_row_stay_apart():
    model = tiny_model("olmoe")
    ids = zoo.tokens(1, 2 * LENGTH)
    positions = torch.arange(LENGTH).repeat(2)[None]
    use_short_attention(model)
    together, _ = step(model, input_ids=ids, position_ids=positions)
    alone, _ = step(model, input_ids=ids[:, LENGTH:])
    torch.testing.assert_close(together[LENGTH:], alone, rtol=1e-4, atol=1e-6)


def test_only_short_rows_with_a_backward_are_computed_the_plain_way(plain, monkeypatch):
    model = tiny_model("qwen3_moe")
    layers, ids = model.config.num_hidden_layers, zoo.tokens(1, LENGTH)
    step(model, input_ids=ids)
    assert plain == []
    use_short_attention(model)
    with torch.no_grad():
        without = model.base_model(input_ids=ids)[0][0]
    assert plain == []
    found, _ = step(model, input_ids=ids)
    assert plain == [LENGTH] * layers
    torch.testing.assert_close(found, without, rtol=1e-4, atol=1e-6)
    monkeypatch.setattr(short_attention, "LONGEST", LENGTH - 1)
    longer, _ = step(model, input_ids=ids)
    assert plain == [LENGTH] * layers
    torch.testing.assert_close(longer, without, rtol=1e-4, atol=1e-6)


def test_a_layer_that_is_made_again_makes_its_attention_again(plain):
    model = tiny_model("olmoe").train()
    use_short_attention(model)
    expected = step(model, input_ids=zoo.tokens(1, LENGTH))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    found = step(model, input_ids=zoo.tokens(1, LENGTH))
    assert len(plain) == 3 * model.config.num_hidden_layers
    assert torch.equal(found[0], expected[0])
    assert all(torch.equal(found[1][name], gradient) for name, gradient in expected[1].items())


def test_no_scores_are_kept_for_the_backward():
    model, kept = tiny_model("olmoe"), []

    def keep(tensor):
        kept.append(tuple(tensor.shape))
        return tensor

    def scores() -> list[tuple[int, ...]]:
        kept.clear()
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            model.base_model(input_ids=zoo.tokens(1, LENGTH), use_cache=False)
        return [shape for shape in kept if shape[-2:] == (LENGTH, LENGTH) and shape[1:2] != (1,)]

    use_short_attention(model)
    assert scores() == [] and kept
    model.set_attn_implementation("eager")
    assert scores()


def test_a_mask_of_another_kind_is_for_fused_attention(plain):
    model, ids = tiny_model("olmoe"), zoo.tokens(1, LENGTH)
    mask = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool).tril()
    expected = model.base_model(input_ids=ids)[0]
    use_short_attention(model)
    found = model.base_model(input_ids=ids, attention_mask=mask)[0]
    assert plain == []
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_a_model_with_an_adapter_of_peft_trains_with_it(plain, monkeypatch):
    """It is the model inside whose code is looked at."""
    from peft import LoraConfig, get_peft_model

    inner, asked = tiny_model("olmoe"), []
    monkeypatch.setattr(short_attention, "has_fused_attention", lambda each: asked.append(each) or True)
    model = get_peft_model(inner, LoraConfig(target_modules=["q_proj"]))
    use_short_attention(model)
    assert asked == [inner]
    model(input_ids=zoo.tokens(1, LENGTH)).logits.sum().backward()
    assert plain and set(plain) == {LENGTH}


@pytest.mark.parametrize("own", ["eager", "sdpa"])
def test_a_model_with_an_attention_of_its_own_or_on_a_gpu_keeps_it(own: str):
    model = tiny_model("olmoe")
    model.set_attn_implementation(own)
    use_short_attention(model if own == "eager" else model.to("meta"))
    assert model.config._attn_implementation == own != NAME

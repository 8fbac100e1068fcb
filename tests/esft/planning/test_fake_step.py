"""Steps without values, beside the same steps with them."""

import logging

import pytest
import torch
from transformers import JambaConfig

import esft
from esft.evaluation.loss import batch_loss, has_plain_head
from esft.experts.moe_layers import moe_layers
from esft.planning import fake_step as module
from esft.planning.fake_step import Batch, fake_step
from esft.planning.live_bytes import LiveBytes
from esft.planning.outline import outline, require_beside, skeleton_of
from esft.planning.stand_in import Sizes
from esft.short_attention import use_short_attention
from tests.esft import zoo
from tests.esft.models import tiny_model

WIDE = {"hidden_size": 128, "vocab_size": 3000, "num_attention_heads": 4, "num_key_value_heads": 4}


def save_config(model, folder) -> None:
    model.config.dtype = model.dtype
    model.config.save_pretrained(folder)


def planned(folder, trained: int, batch: Batch, layers: bool = False, others: bool = False, recompute: str = "none"):
    found, skeleton = outline(str(folder)), skeleton_of(str(folder))
    require_beside(skeleton, others, others)
    sizes = {
        layer.name: Sizes(layer.experts, trained, layer.shape, trained / layer.experts, recompute)
        for layer in found.layers
    }
    return fake_step(skeleton, sizes, batch, layers)


def measured(model, trained: int, batch: Batch, layers: bool = False, others: bool = False, recompute: str = "none"):
    chosen = {layer.index: list(range(trained)) for layer in moe_layers(model)}
    if layers:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    selection = esft.ExpertSelection(chosen, non_expert_modules=others, shared_experts=others)
    esft.swap(model, selection, "cpu", recompute)
    has_plain_head(model.eval())
    use_short_attention(model)
    ids = torch.randint(5, 250, (batch.records, batch.length))
    # Padding somewhere, as in most batches: attention has a mask then.
    mask = torch.ones_like(ids)
    mask[0, -1] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": ids}
    with LiveBytes([*model.parameters(), *model.buffers(), *inputs.values()]) as live:
        for _ in range(1 + batch.accumulates):
            total, _ = batch_loss(model.train(), inputs)
            total.backward()
            del total
    return live.peak


@pytest.mark.parametrize("family", ["deepseek_v2", "qwen3_moe"])
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"recompute": "frozen"},
        {"layers": True},
        {"others": True},
        {"trained": 8},
        {"batch": Batch(4, 64, accumulates=True), "others": True},
        {"batch": Batch(1, 200)},
    ],
    ids=str,
)
def test_a_step_is_planned_to_take_what_it_takes(tmp_path, family: str, how: dict):
    model = tiny_model(family, **WIDE, dtype=torch.bfloat16)
    save_config(model, tmp_path)
    how = {"trained": 3, "batch": Batch(4, 64)} | how
    if family in ("qwen3_moe",) and how.get("others"):
        how["others"] = False  # no shared experts to name
    found = planned(tmp_path, **how)
    assert found.peak == pytest.approx(measured(model, **how), rel=0.06)
    assert 0 < found.kept < found.peak


def test_more_tokens_keep_more_and_waiting_gradients_are_on_top(tmp_path):
    save_config(tiny_model(dtype=torch.bfloat16, **WIDE), tmp_path)
    short, long = (planned(tmp_path, 3, Batch(2, length)) for length in (50, 100))
    assert 1.9 * short.kept < long.kept
    waiting = planned(tmp_path, 8, Batch(2, 50, accumulates=True))
    assert waiting.peak > planned(tmp_path, 8, Batch(2, 50)).peak


def test_an_embedding_that_is_the_head_too_has_one_gradient(tmp_path):
    peaks = {}
    for tied in (False, True):
        model = tiny_model("qwen3_moe", dtype=torch.bfloat16, tie_word_embeddings=tied, **WIDE)
        save_config(model, tmp_path / str(tied))
        peaks[tied] = planned(tmp_path / str(tied), 3, Batch(1, 8, accumulates=True), others=True).peak
    assert peaks[False] - peaks[True] == pytest.approx(WIDE["vocab_size"] * WIDE["hidden_size"] * 2, rel=0.1)


def test_a_model_whose_tensors_do_not_fit_is_told_of_in_one_line(tmp_path, caplog):
    save_config(tiny_model(), tmp_path)
    with pytest.raises(esft.InputError, match=r"its step cannot be planned \(numel: integer multiplication overflow"):
        planned(tmp_path, 8, Batch(1, 1 << 40))
    assert not caplog.records and not logging.getLogger("torch._subclasses.fake_tensor").disabled


def test_a_model_that_asks_for_values_is_named(tmp_path, monkeypatch):
    save_config(tiny_model(), tmp_path)
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Model

    def forward(self, input_ids, **_):
        return input_ids.sum().item()

    monkeypatch.setattr(DeepseekV2Model, "forward", forward)
    with pytest.raises(esft.InputError, match="^DeepseekV2ForCausalLM: its step cannot be planned"):
        planned(tmp_path, 3, Batch(2, 50))


def test_a_step_that_goes_token_by_token_is_planned_of_shorter_records(tmp_path, monkeypatch):
    save_config(zoo.tiny("jamba", hidden_size=128, intermediate_size=256), tmp_path)
    monkeypatch.setattr(module, "MANY", 10**9)
    whole = planned(tmp_path, 3, Batch(1, 256))
    assert not whole.of_shorter
    monkeypatch.setattr(module, "MANY", 2000)
    asked, real = [], module._measured
    monkeypatch.setattr(module, "_measured", lambda model, batch, most: asked.append(batch) or real(model, batch, most))
    shorter = planned(tmp_path, 3, Batch(1, 256))
    assert shorter.of_shorter and asked == [Batch(1, 256), Batch(32, 8)]
    assert shorter.peak == pytest.approx(whole.peak, rel=0.04)
    assert shorter.kept + 4 * 256**2 == pytest.approx(whole.kept, rel=0.01)  # with the mask


def test_a_step_of_many_operations_whatever_its_tokens_is_planned_as_it_is(tmp_path, monkeypatch):
    save_config(tiny_model(), tmp_path)
    whole = planned(tmp_path, 3, Batch(2, 50))
    for name in ("MANY", "MANY_A_TOKEN"):
        monkeypatch.setattr(module, name, 1)
    assert planned(tmp_path, 3, Batch(2, 50)) == whole


def test_the_layers_of_a_default_jamba_are_told_to_go_token_by_token_at_once(tmp_path, monkeypatch):
    JambaConfig(num_hidden_layers=2, use_mamba_kernels=False).save_pretrained(tmp_path)
    asked, real = [], module._measured
    monkeypatch.setattr(module, "_measured", lambda model, batch, most: asked.append(batch) or real(model, batch, most))
    assert planned(tmp_path, 3, Batch(1, 2048)).of_shorter
    assert asked == [Batch(1, 2048), Batch(256, 8)]

"""Frozen linear layers and embeddings in few bits: which they are, and that the model computes with their values."""

import pytest
import torch
from torch import nn

import esft
from esft.checkpoint.folder import Checkpoint
from esft.checkpoint.load import load_model
from esft.experts.model_state import swapped_state
from esft.experts.moe_layers import moe_layers
from esft.experts.pooled_experts import BF16
from esft.selection import ExpertSelection
from esft.swapping import load as loading
from esft.swapping.packed_modules import (
    FROZEN_LINEAR,
    LinearFilling,
    PackedEmbedding,
    PackedLinear,
    PackedModule,
    linear_places,
    packable,
    packed,
)
from tests.esft import zoo
from tests.esft.checkpoint.files import rewrite
from tests.esft.checkpoint.packed import fp8_checkpoint
from tests.esft.experts.test_moe_layers import FAMILIES, output
from tests.esft.models import save_tiny, tiny_model

SELECTION = ExpertSelection({1: [5, 2]})


def packed_names(model) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, PackedModule)}


@torch.no_grad()
def unpacked(model):
    """The same model with the decoded weights in plain modules."""
    for name in packed_names(model):
        module = model.get_submodule(name)
        if isinstance(module, PackedLinear):
            plain = nn.Linear(module.columns, module.rows, module.bias is not None, dtype=module.dtype)
            plain.weight.copy_(module(torch.eye(module.columns, dtype=module.dtype)).T)
            if module.bias is not None:
                plain.weight.sub_(module.bias[:, None])
                plain.bias.copy_(module.bias)
        else:
            plain = nn.Embedding(module.rows, module.columns, dtype=module.dtype)
            plain.weight.copy_(module(torch.arange(module.rows)))
        model.set_submodule(name, plain.requires_grad_(False))
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_computes_with_the_values_of_the_few_bits(family: str):
    model = zoo.tiny(family)
    first = moe_layers(model)[0]
    found = esft.swap(model, ExpertSelection({first.index: [2, 1]}), frozen_linear="nf4")
    assert packed_names(found)
    out = output(found)
    assert torch.isfinite(out).all()
    torch.testing.assert_close(out, output(unpacked(found)), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("linear", ["int8", "nf4"])
@pytest.mark.parametrize("family", ["deepseek_v2", "gpt_oss", "qwen3_moe"])
def test_loaded_as_a_stream_it_is_the_stock_model_swapped(family: str, linear: str, tmp_path, monkeypatch):
    zoo.tiny(family).save_pretrained(tmp_path)
    stock = load_model(str(tmp_path))
    monkeypatch.setattr(loading, "load_model", None)
    found = esft.load(str(tmp_path), SELECTION, frozen_linear=linear)
    other = esft.swap(stock, SELECTION, frozen_linear=linear)
    assert packed_names(found) == packed_names(other) != set()
    one, two = found.state_dict(), other.state_dict()
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert swapped_state(found).base.digest == Checkpoint.open(tmp_path).digest() == swapped_state(other).base.digest
    assert swapped_state(found).frozen_linear == swapped_state(other).frozen_linear == linear
    results = [output(model) for model in (found, other)]
    assert torch.equal(*results)
    for model, logits in zip((found, other), results, strict=True):
        logits.square().mean().backward()
        assert {name for name, p in model.named_parameters() if p.grad is not None}
    for name, p in found.named_parameters():
        grad = other.get_parameter(name).grad
        assert (p.grad is None and grad is None) or torch.equal(p.grad, grad)


def test_what_trains_and_head_and_routers_stay_plain():
    model = tiny_model()
    everything = packable(model, ExpertSelection({}))
    assert "lm_head" not in everything and "model.embed_tokens" in everything
    assert not [name for name in everything if name[-5:] == ".gate" or ".experts." in name]
    shared = {name for name in everything if "shared_expert" in name}
    attention = {name for name in everything if "self_attn" in name}
    assert shared and attention
    assert packable(model, ExpertSelection({}, shared_experts=True)).keys() == everything.keys() - shared
    assert packable(model, ExpertSelection({}, non_expert_modules=True)).keys() == shared
    assert not packable(model, ExpertSelection({}, True, True))


def test_an_embedding_that_is_the_head_as_well_stays_plain(tmp_path):
    model = zoo.tiny("qwen3_moe")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    assert "model.embed_tokens" not in packable(model, ExpertSelection({}))


def test_a_module_of_another_dtype_or_class_stays_plain():
    model = tiny_model().to(torch.bfloat16)
    attention = model.model.layers[0].self_attn
    linear = next(name for name, m in attention.named_children() if type(m) is nn.Linear)
    name = f"model.layers.0.self_attn.{linear}"
    assert name in packable(model, ExpertSelection({}))
    attention.get_submodule(linear).to(torch.float32)
    assert name not in packable(model, ExpertSelection({}))


def test_it_costs_what_the_format_costs_and_no_unswapping(tmp_path):
    base = save_tiny(tmp_path / "base")
    plain, small = (esft.load(str(base), SELECTION, frozen_linear=kind) for kind in (BF16, "nf4"))
    assert not packed_names(plain)
    for name in packed_names(small):
        module = small.get_submodule(name)
        assert isinstance(module, PackedEmbedding if "embed" in name else PackedLinear)
        assert f"rows={module.rows}, columns={module.columns}, format='nf4'" in repr(module)
    assert swapped_state(plain).lossless and not swapped_state(small).lossless
    with pytest.raises(esft.InputError, match="and the frozen linear layers are in nf4, which"):
        esft.unswap(small)
    adapter = esft.save_adapter(small, tmp_path / "adapter")
    assert esft.load_adapter(plain, tmp_path / "adapter") is plain or adapter
    assert '"frozen_linear": "nf4"' in (tmp_path / "adapter" / "manifest.json").read_text()


def test_other_weights_of_an_fp8_checkpoint_are_read_and_packed(tmp_path):
    base = fp8_checkpoint(tmp_path / "base")
    found = esft.load(str(base), SELECTION, frozen_linear="int8")
    other = esft.swap(load_model(str(base)), SELECTION, frozen_linear="int8")
    assert packed_names(found) == packed_names(other)
    for name in packed_names(found):
        parts = [model.get_submodule(name).parts for model in (found, other)]
        assert all(torch.equal(*pair) for pair in zip(*parts, strict=True))


def test_what_cannot_be_is_one_error(tmp_path):
    base = save_tiny(tmp_path / "base")
    with pytest.raises(esft.InputError, match=f"frozen_linear must be one of {', '.join(FROZEN_LINEAR)}, got 'fp8'"):
        esft.load(str(base), SELECTION, frozen_linear="fp8")
    model = tiny_model()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    with torch.no_grad():
        model.model.embed_tokens.weight[3, 1] = torch.inf
    before["model.embed_tokens.weight"][3, 1] = torch.inf
    with pytest.raises(esft.InputError, match=r"model.embed_tokens: its weights are not finite"):
        esft.swap(model, SELECTION, frozen_linear="nf4")
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())

    def spoil(tensors):
        tensors["model.embed_tokens.weight"][3, 1] = torch.inf

    rewrite(base, spoil)
    with pytest.raises(esft.InputError, match=r"tensor model.embed_tokens.weight: nf4: weights are not finite"):
        esft.load(str(base), SELECTION, frozen_linear="nf4")


@pytest.mark.parametrize("training", [True, False])
def test_packed_modules_are_in_the_mode_of_those_in_whose_place_they_are(training: bool):
    model = esft.swap(tiny_model().train(training), SELECTION, frozen_linear="int8")
    assert {module.training for module in model.modules() if isinstance(module, PackedModule)} == {training}


def test_the_bias_of_a_packed_layer_is_the_layers_own_and_is_added():
    layer = nn.Linear(70, 5)
    small = packed(layer, "int8")
    small.write(layer.weight)
    assert small.bias is layer.bias
    x = torch.zeros(2, 70)
    assert torch.equal(small(x), layer.bias.detach().expand(2, 5))


def test_token_ids_of_any_shape_are_looked_up():
    table = nn.Embedding(9, 70).bfloat16()
    small = packed(table, "int8")
    small.write(table.weight)
    for ids in (
        torch.tensor([[3, 0, 8]]),
        torch.tensor(5),
        torch.zeros(2, 0, dtype=torch.int64),
        torch.zeros(2, 1, 3).long(),
    ):
        found = small(ids)
        assert found.shape == (*ids.shape, 70) and found.dtype == torch.bfloat16
        torch.testing.assert_close(found, table(ids), rtol=0, atol=0.03)


def test_weights_go_where_their_modules_are(monkeypatch):
    """The meta device stands for a GPU."""
    selection, places = ExpertSelection({1: [0]}), []
    model = esft.swap(tiny_model(), selection, frozen_linear="nf4").to("meta")
    monkeypatch.setattr(PackedModule, "write", lambda self, weight: places.append(weight.device.type))
    stored = linear_places(tiny_model(), selection)
    tensors = [(name, torch.zeros(tensor.shape)) for name, tensor in stored.items()]
    assert list(LinearFilling(model, stored, "m").through(tensors)) == tensors
    assert len(places) == len(stored) and set(places) == {"meta"}

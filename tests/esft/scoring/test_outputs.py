import math

import pytest
import torch
import torch.nn.functional as F

import esft
from esft.experts.moe_layers import moe_layers
from esft.scoring import outputs as module
from esft.scoring.outputs import output_sums, outputs
from esft.scoring.routers import Choice
from tests.esft import zoo
from tests.esft.models import tiny_model, token_batch


def seen_by_experts(model, batch) -> dict:
    """Layer -> what its experts get and put out."""
    seen = {}
    hooks = [
        layer.experts.register_forward_hook(lambda _, args, out, i=layer.index: seen.update({i: (*args, out)}))
        for layer in moe_layers(model)
    ]
    with torch.no_grad():
        model(**batch)
    for hook in hooks:
        hook.remove()
    return seen


@torch.no_grad()
def by_hand(model, batch) -> dict[int, list[float]]:
    """The scores of DeepSeek's experts, one (token, expert) pair at a time."""
    kept, found = batch["attention_mask"].flatten().tolist(), {}
    weights = {layer.index: layer.experts for layer in moe_layers(model)}
    for index, (x_TD, chosen, gates, out_TD) in seen_by_experts(model, batch).items():
        scores = [0.0] * 8
        for t in [t for t, keep in enumerate(kept) if keep]:
            h, after = x_TD[t], x_TD[t] + out_TD[t]
            turned = 1 - float(h @ after / (h.norm() * after.norm()))
            for expert, gate in zip(chosen[t].tolist(), gates[t].tolist(), strict=True):
                a = weights[index].gate_up_proj[expert] @ h
                y = weights[index].down_proj[expert] @ (F.silu(a[:20]) * a[20:])
                scores[expert] += gate * float(y.norm()) * turned
        found[index] = [score / sum(kept) for score in scores]
    return found


@pytest.mark.parametrize("swapped", [False, True])
def test_an_experts_score_is_its_weighted_output_where_the_layer_turns_the_token(monkeypatch, swapped: bool):
    monkeypatch.setattr(module, "ROWS", 20)  # tokens come in parts
    model, batch = tiny_model(dtype=torch.float64), token_batch()
    model.set_experts_implementation("eager")  # the others have no float64
    expected = by_hand(model, batch)
    if swapped:
        esft.swap(model, esft.ExpertSelection({2: [1, 4]}), "reference")
    scores = esft.score_experts(model, [batch], outputs=True)
    assert list(scores.output_scores) == list(expected) == [1, 2]
    for layer, experts in scores.output_scores.items():
        assert experts == pytest.approx(dict(enumerate(expected[layer])), rel=1e-9)
    plain = esft.score_experts(model, [batch])
    assert plain.output_scores == {} and plain.token_scores == scores.token_scores
    assert plain.gate_scores == scores.gate_scores


# Biases and interleaved gates; an activation of its own; transposed; gates before the experts; a norm behind them.
@pytest.mark.parametrize("family", ["gpt_oss", "inkling2", "muse_spark", "mixtral"])
def test_weighted_outputs_add_up_to_the_layers(family: str):
    model = zoo.tiny(family)
    for layer in moe_layers(model):
        seen = seen_by_experts(model, {"input_ids": zoo.tokens()})
        x_TD, index_TK, weights_TK, out_TD = seen[layer.index]
        taken = weights_TK != 0
        y_TKD = outputs(layer.experts, x_TD, index_TK, taken)
        torch.testing.assert_close((weights_TK[..., None] * y_TKD).sum(1), out_TD, atol=1e-5, rtol=1e-4)


def test_empty_slots_put_out_nothing_and_have_no_score():
    model = tiny_model(dtype=torch.float64)
    model.set_experts_implementation("eager")
    (layer, *_) = moe_layers(model)
    x_TD, index_TK = torch.randn(5, 32).double(), torch.tensor([[1, 2]] * 4 + [[3, 2]])
    weights_TK = torch.tensor([[0.5, 0.0]] * 5).double()
    y_TKD = outputs(layer.experts, x_TD, index_TK, weights_TK != 0)
    assert not y_TKD[:, 1].any() and y_TKD[:, 0].any(dim=-1).all()
    total = output_sums(layer, Choice(None, index_TK, weights_TK, x_TD))
    assert total.dtype == torch.float64 and (total > 0).tolist() == [False, True, False, True] + [False] * 4


def test_outputs_that_are_no_numbers_are_refused():
    model = tiny_model()
    with torch.no_grad():
        moe_layers(model)[1].experts.down_proj[:] = math.inf
    with pytest.raises(
        esft.InputError, match="^layer 2: its experts put out what is no number; the weights hold such$"
    ):
        esft.score_experts(model, [token_batch()], outputs=True)


def test_outputs_of_16_bits_are_measured_in_64():
    model = tiny_model(dtype=torch.bfloat16)
    model.set_experts_implementation("eager")
    (layer, *_) = moe_layers(model)
    x_TD, index_TK, weights_TK = torch.randn(5, 32).bfloat16(), torch.tensor([[1, 2]] * 5), torch.rand(5, 2)
    with torch.no_grad():
        y_TKD = outputs(layer.experts, x_TD, index_TK, weights_TK != 0).double()
    h, after = x_TD.double(), x_TD.double() + (weights_TK.double()[..., None] * y_TKD).sum(dim=1)
    turned = 1 - (h * after).sum(dim=1) / (h.norm(dim=1) * after.norm(dim=1))
    expected = (weights_TK.double() * y_TKD.norm(dim=-1) * turned[:, None]).sum(dim=0)
    total = output_sums(layer, Choice(None, index_TK, weights_TK, x_TD))
    torch.testing.assert_close(total[[1, 2]], expected, rtol=1e-9, atol=0)

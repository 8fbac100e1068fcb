import importlib

import pytest
import torch

import esft
from esft.experts.moe_layers import moe_layers
from esft.scoring.routers import Choice
from esft.selection import ExpertSelection
from esft.training.load_balancing import balance_loss, balance_losses
from tests.esft.models import tiny_model, token_batch


def choice(index: list[list[int]], gates: torch.Tensor | None) -> Choice:
    chosen = torch.tensor(index)
    return Choice(gates, chosen, torch.ones_like(chosen), torch.empty(0))


def test_it_is_one_where_choices_are_spread_and_the_number_of_experts_where_all_take_one():
    spread = choice([[0, 1], [2, 3], [1, 2], [3, 0]], torch.full((4, 4), 0.25))
    assert balance_loss(spread) == pytest.approx(1.0)
    alone = choice([[2], [2], [2]], torch.eye(4)[[2, 2, 2]])
    assert balance_loss(alone) == pytest.approx(4.0)


def test_gate_values_that_do_not_sum_to_one_are_normalised_token_by_token():
    # The shares of the two tokens are (1/4, 3/4) and (1/2, 1/2), so their mean is (3/8, 5/8); all choose expert 1.
    gates = torch.tensor([[0.2, 0.6], [0.9, 0.9]])
    assert balance_loss(choice([[1], [1]], gates)) == pytest.approx(2 * 5 / 8)
    assert balance_loss(choice([[0], [1]], gates)) == pytest.approx(2 * (3 / 8 + 5 / 8) / 2)


def test_slots_that_no_expert_took_are_no_choices():
    gates = torch.tensor([[0.5, 0.25, 0.25], [0.5, 0.25, 0.25]])
    index = torch.tensor([[0, 1], [0, 2]])
    taken = torch.tensor([[True, True], [True, False]])
    # Of three choices two are of expert 0 and one is of expert 1.
    assert balance_loss(Choice(gates, index, taken, torch.empty(0))) == pytest.approx(3 * (2 / 3 * 0.5 + 1 / 3 * 0.25))


def test_it_can_be_differentiated_through_the_gate_values_in_their_own_precision():
    gates = torch.rand(4, 3, dtype=torch.float64).requires_grad_()
    loss = balance_loss(choice([[0, 1], [0, 2], [1, 0], [0, 1]], gates))
    assert loss.dtype == torch.float64 and loss.shape == ()
    (found,) = torch.autograd.grad(loss, gates)
    total, weights = gates.detach().sum(-1, keepdim=True), torch.tensor([4, 3, 1], dtype=torch.float64) / 8
    # E / T sum_e w_e g_e / G has the gradient E / T (w_e / G - sum_e' w_e' g_e' / G^2).
    expected = 3 / 4 * (weights / total - (weights * gates.detach()).sum(-1, keepdim=True) / total**2)
    torch.testing.assert_close(found, expected)


def test_a_choice_without_gate_values_is_refused():
    with pytest.raises(esft.InputError, match="routers of one expert a token do not tell their gate values"):
        balance_loss(choice([[0], [1]], None))


def test_it_is_the_sum_that_transformers_computes_layer_by_layer():
    model = tiny_model("qwen3_moe")
    batch = token_batch()
    with torch.no_grad(), balance_losses(model, batch["attention_mask"]) as losses:
        out = model(**batch, output_router_logits=True)
    theirs = importlib.import_module("transformers.models.qwen3_moe.modeling_qwen3_moe").load_balancing_loss_func
    assert len(losses) == 3
    for ours, logits in zip(losses, out.router_logits, strict=True):
        # transformers adds up the K choices where the papers average them.
        expected = theirs((logits,), 8, 3, batch["attention_mask"]) / 3
        assert ours == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])  # a softmax and a sigmoid
def test_every_layer_gives_its_own_loss_of_the_tokens_that_are_no_padding(family: str):
    model, batch = tiny_model(family), token_batch()
    batch["attention_mask"][0, :3] = 0
    seen = []
    for layer in moe_layers(model):
        layer.router.register_forward_hook(lambda _, __, out: seen.append((out[0], out[2])))
    with torch.no_grad(), balance_losses(model, batch["attention_mask"]) as losses:
        model(**batch)
    assert len(losses) == len(seen) == 2
    keep = [t for t, m in enumerate(batch["attention_mask"].flatten().tolist()) if m]
    for ours, (logits, index) in zip(losses, seen, strict=True):
        gates = logits[keep].sigmoid() if family == "deepseek_v3" else logits[keep].softmax(-1)
        expected = 0.0
        for expert in range(8):
            chosen = sum(index[t].tolist().count(expert) for t in keep) / (3 * len(keep))
            mean = sum(float(g[expert] / g.sum()) for g in gates) / len(keep)
            expected += 8 * chosen * mean
        assert float(ours) == pytest.approx(expected, rel=1e-5)


def test_its_gradient_reaches_selected_experts_below_and_a_router_only_where_that_trains():
    for everything in (False, True):
        model = esft.swap(tiny_model(), ExpertSelection({1: [0, 1, 2, 3, 4, 5, 6, 7]}, non_expert_modules=everything))
        batch = token_batch()
        with balance_losses(model, batch["attention_mask"]) as losses:
            model(**batch)
        torch.stack(losses).sum().backward()
        reached = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.count_nonzero()}
        assert "model.layers.1.mlp.experts.trained_down_proj" in reached
        assert ("model.layers.2.mlp.gate.weight" in reached) == everything


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_is_refused_in_training_only(reentrant: bool):
    model, batch = tiny_model(), token_batch()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    refused = pytest.raises(esft.InputError, match="auxiliary loss and gradient checkpointing")
    with refused, balance_losses(model, batch["attention_mask"]):
        pass
    model.eval()
    with balance_losses(model, batch["attention_mask"]) as losses:
        model(**batch)
    assert len(losses) == 2


def test_training_without_gradient_checkpointing_is_not_refused():
    model, batch = tiny_model().train(), token_batch()
    with balance_losses(model, batch["attention_mask"]) as losses:
        model(**batch)
    assert len(losses) == 2 and all(loss.requires_grad for loss in losses)


def test_nothing_watches_the_model_after_the_block():
    model, batch = tiny_model(), token_batch()
    with balance_losses(model, batch["attention_mask"]) as losses:
        pass
    model(**batch)
    assert losses == []

import importlib

import pytest
import torch
from esft.balance import balance_loss, balance_losses
from esft.routers import Choice
from esft.select import ExpertSelection

import esft
from tests.esft.models import tiny_model, token_batch


def choice(index: list[list[int]], gates: torch.Tensor) -> Choice:
    chosen = torch.tensor(index)
    return Choice(gates, chosen, torch.ones_like(chosen, dtype=torch.bool))


def test_it_is_one_where_choices_are_spread_and_the_number_of_experts_where_all_take_one():
    spread = choice([[0, 1], [2, 3], [1, 2], [3, 0]], torch.full((4, 4), 0.25))
    assert balance_loss(spread) == pytest.approx(1.0)
    alone = choice([[2], [2], [2]], torch.eye(4)[[2, 2, 2]])
    assert balance_loss(alone) == pytest.approx(4.0)


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

import importlib

import pytest
import torch

import esft
from esft.data.batches import collate
from esft.data.examples import IGNORE, Example, joined
from esft.evaluation.loss import batch_loss, has_plain_head
from esft.experts.moe_layers import moe_layers
from esft.parallel.ranks import ALONE, Ranks
from esft.scoring.routers import Choice
from esft.selection import ExpertSelection
from esft.training.auxiliary_losses import Base, balance_loss, balance_losses, held_loss
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


def test_the_parts_of_several_ranks_add_up_to_the_loss_of_the_whole():
    model, whole, counted = tiny_model(), token_batch(4), []

    class First(Ranks):
        size = 2

        def sum(self, values: torch.Tensor) -> torch.Tensor:
            counted.append(values)
            return values

    class Second(Ranks):
        size = 2

        def sum(self, values: torch.Tensor) -> torch.Tensor:
            return torch.stack(counted).sum(0)

    def losses(batch, ranks: Ranks) -> torch.Tensor:
        with torch.no_grad(), balance_losses(model, batch["attention_mask"], ranks) as found:
            model(**batch)
        return torch.stack(found)

    parts = [{name: tensor[rows] for name, tensor in whole.items()} for rows in (slice(0, 1), slice(1, 4))]
    for part in parts:
        losses(part, First())
    with balance_losses(model, None, First()) as none:
        pass
    assert none == [] and not counted[-1].any()
    torch.testing.assert_close(sum(losses(part, Second()) for part in parts), losses(whole, ALONE))


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


EVERYTHING = esft.ExpertSelection({1: list(range(8)), 2: list(range(8))}, True, True)
SOME = esft.ExpertSelection({1: [2, 7], 2: [0]}, shared_experts=True)


def example(length: int, seed: int, mixed: bool = False) -> Example:
    drawn = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 256, (length,), generator=drawn).tolist()
    return Example(ids, [IGNORE] * (length // 2) + ids[length // 2 :], mixed=(0,) if mixed else ())


BATCHES = {
    "rows": collate([example(9, 1), example(7, 2, True), example(5, 3), example(8, 4, True)], 258),
    "packed": collate([joined([example(9, 1), example(7, 2, True)]), example(12, 3)], 258),
    "all mixed": collate([example(9, 1, True), example(7, 2, True)], 258),
}


def twice(selection, plain: bool = True) -> tuple:
    """A model that has moved away from its base, and the base."""
    models = []
    for _ in range(2):
        model = tiny_model(dtype=torch.float64)
        model.set_experts_implementation("eager")  # the others have no float64
        if not plain:
            model.lm_head.register_forward_hook(lambda module, args, out: 0.5 * out)
        models.append(esft.swap(model, selection, "reference").train())
    held = Base(models[0])
    move(models[0])
    return models[0], models[1], held


@torch.no_grad()
def move(model) -> None:
    torch.manual_seed(5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter), alpha=0.02)


def divergence(model, base, batch) -> torch.Tensor:
    """From all logits of two models."""
    inputs = {"input_ids": batch["input_ids"]}
    inputs |= {name: batch[name] for name in ["position_ids" if "position_ids" in batch else "attention_mask"]}
    wanted = (batch["labels"][:, 1:] != IGNORE) & batch["mixed"][:, 1:]
    log_probs = model(**inputs, use_cache=False).logits[:, :-1].log_softmax(-1)[wanted]
    with torch.no_grad():
        target = base(**inputs, use_cache=False).logits[:, :-1].softmax(-1)[wanted]
    return (target * (target.log() - log_probs)).sum()


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("selection", [SOME, EVERYTHING], ids=["some", "everything"])
@pytest.mark.parametrize("plain", [True, False])
def test_the_divergence_and_its_gradient_are_those_of_two_models(monkeypatch, batch: str, selection, plain: bool):
    monkeypatch.setattr("esft.training.auxiliary_losses.chunk_rows", lambda vocabulary: 3)
    model, base, held = twice(selection, plain)
    trained = [p for p in model.parameters() if p.requires_grad]
    wanted = divergence(model, base, BATCHES[batch])
    wanted_grads = torch.autograd.grad(wanted, trained, allow_unused=True)
    predicted = held.predictions(BATCHES[batch])
    total, found = held_loss(model, BATCHES[batch], predicted)
    grads = torch.autograd.grad(found, trained, retain_graph=True, allow_unused=True)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-9) and found > 0.001
    for grad, expected in zip(grads, wanted_grads, strict=True):
        assert (grad is None) == (expected is None)
        if grad is not None:
            torch.testing.assert_close(grad, expected, rtol=1e-7, atol=1e-12)
    expected, _ = batch_loss(model, BATCHES[batch])
    assert total.item() == pytest.approx(expected.item(), rel=1e-12)
    of_both = (torch.autograd.grad(loss, trained, allow_unused=True) for loss in (total, expected))
    for grad, alone in zip(*of_both, strict=True):
        assert (grad is None) == (alone is None)
        if grad is not None:
            torch.testing.assert_close(grad, alone)


def test_the_model_is_left_as_it_was_and_the_base_stays_where_it_was():
    model, base, held = twice(SOME)
    before = [(p.data_ptr(), p.detach().clone()) for p in model.parameters()]
    first = held.predictions(BATCHES["rows"])
    assert all(module.training for module in model.modules())
    for parameter, (place, values) in zip(model.parameters(), before, strict=True):
        assert parameter.data_ptr() == place and torch.equal(parameter, values)
    move(model)
    again = held.predictions(BATCHES["rows"])
    model.eval()
    held.predictions(BATCHES["rows"])
    assert not any(module.training for module in model.modules())
    assert torch.equal(first.hidden_ND, again.hidden_ND) and not again.hidden_ND.requires_grad


def test_the_base_draws_nothing():
    model = esft.swap(tiny_model(attention_dropout=0.5), SOME).train()
    held = Base(model)
    first, second = (held.predictions(BATCHES["rows"]).hidden_ND for _ in range(2))
    assert torch.equal(first, second)


def test_an_error_leaves_the_model_as_it_was(monkeypatch):
    model, _, held = twice(SOME)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(KeyError):
        held.predictions({name: BATCHES["rows"][name] for name in ("mixed", "labels", "attention_mask")})
    assert all(map(torch.equal, model.parameters(), before)) and model.training


def test_a_batch_with_nothing_mixed_in_asks_nothing_of_the_base():
    model, _, held = twice(SOME)
    model.register_forward_pre_hook(lambda *args: pytest.fail("ran"))
    assert held.predictions(collate([example(9, 1)], 258)) is None
    unsupervised = Example([5, 6, 7], [IGNORE] * 3, mixed=(0,))
    assert held.predictions(collate([example(9, 1), unsupervised], 258)) is None


def test_only_rows_with_something_mixed_in_go_through_the_base():
    model, _, held = twice(SOME)
    has_plain_head(model)  # tries the model out
    rows = []
    model.model.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    held.predictions(BATCHES["rows"])
    assert rows == [2]

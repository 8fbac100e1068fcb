from contextlib import nullcontext

import pytest
import torch

import esft
from esft.data.batches import collate
from esft.data.examples import IGNORE, Example
from esft.evaluation.loss import batch_loss
from esft.experts.moe_layers import moe_layers
from esft.experts.stock_layout import read_layout
from esft.parallel.ranks import Ranks
from esft.scoring.gradients import _Sums, gradient_scores
from tests.esft import zoo
from tests.esft.models import tiny_model


def records(seed: int = 0, vocabulary: int = 64) -> list[Example]:
    """Of two lengths, with the second half supervised."""
    drawn = torch.Generator().manual_seed(seed)
    rows = [torch.randint(3, vocabulary, (length,), generator=drawn).tolist() for length in (9, 6)]
    return [Example(row, [IGNORE] * (len(row) // 2) + row[len(row) // 2 :]) for row in rows]


BATCHES = [collate(records(1), 0), collate(records(2)[:1], 0)]


def of_hidden(model, batch):
    """A loss that needs no head."""
    hidden = model.base_model(input_ids=batch["input_ids"]).last_hidden_state
    return hidden.tanh().sum(), hidden.shape[1]


def by_autograd(model, batches, loss=batch_loss) -> dict[int, torch.Tensor]:
    """Mean over batches of the squared norm of each expert's gradient, of a stock model."""
    found = {}
    for batch in batches:
        model.zero_grad()
        total, targets = loss(model, batch)
        (total / targets).backward()
        for layer in moe_layers(model):
            names = read_layout(layer.experts, layer.name).names
            squares = [getattr(layer.experts, name).grad.double().flatten(1).square().sum(1) for name in names]
            found[layer.index] = found.get(layer.index, 0) + sum(squares) / len(batches)
    return found


def rows_by_autograd(model, batches, loss=batch_loss) -> dict[int, torch.Tensor]:
    """The same with each row's gradient taken for itself: one (token, expert) pair at a time through the module."""
    found = {layer.index: torch.zeros(layer.num_experts).double() for layer in moe_layers(model)}
    for batch in batches:
        seen = {}

        def keep(_, args, out, seen=seen):
            out.retain_grad()
            seen[_] = (*args, out)

        hooks = [layer.experts.register_forward_hook(keep) for layer in moe_layers(model)]
        total, targets = loss(model, batch)
        (total / targets).backward()
        for hook in hooks:
            hook.remove()
        for layer in moe_layers(model):
            x_TD, index_TK, weights_TK, out_TD = seen[layer.experts]
            names = read_layout(layer.experts, layer.name).names
            parameters = [getattr(layer.experts, name) for name in names]
            for t, k in torch.cartesian_prod(*map(torch.arange, index_TK.shape)).tolist():
                one, gate = index_TK[t : t + 1, k : k + 1], weights_TK[t : t + 1, k : k + 1].detach()
                alone = layer.experts(x_TD[t : t + 1].detach(), one, gate)
                grads = torch.autograd.grad(alone, parameters, out_TD.grad[t : t + 1])
                found[layer.index][one.item()] += sum(g.square().sum() for g in grads) / len(batches)
    return found


def test_scores_are_the_squared_gradients_that_autograd_gives_the_stock_model():
    model = tiny_model(dtype=torch.float64)
    model.set_experts_implementation("eager")  # the others have no float64
    together, apart = by_autograd(model, BATCHES), rows_by_autograd(model, BATCHES)
    model.zero_grad()
    esft.swap(model, esft.ExpertSelection({2: [1, 4]}), "reference")
    of_batches, of_rows = gradient_scores(model, BATCHES, batch_loss)
    assert list(of_batches) == list(of_rows) == [1, 2]
    for layer in (1, 2):
        assert list(of_batches[layer].values()) == pytest.approx(together[layer].tolist(), rel=1e-5)
        assert list(of_rows[layer].values()) == pytest.approx(apart[layer].tolist(), rel=1e-5)
        assert min(together[layer]) == 0 or max(together[layer]) > 10 * min(together[layer])  # they differ
    # No gradient is left, what trains is as it was, and no hook.
    assert all(p.grad is None for p in model.parameters())
    assert sorted(n for n, p in model.named_parameters() if p.requires_grad) == [
        f"model.layers.2.mlp.experts.trained_{name}_proj" for name in ("down", "gate_up")
    ]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("family", ["gpt_oss", "muse_spark"])  # biases; a norm behind each expert
def test_biases_and_norms_have_their_part(family: str):
    model = zoo.tiny(family)
    together = by_autograd(model, BATCHES, of_hidden)
    apart = rows_by_autograd(model, BATCHES[1:], of_hidden)
    with pytest.warns(UserWarning) if family == "muse_spark" else nullcontext():
        esft.swap(model, esft.ExpertSelection({}))
    of_batches, _ = gradient_scores(model, BATCHES, of_hidden)
    _, of_rows = gradient_scores(model, BATCHES[1:], of_hidden)
    for layer, squares in together.items():
        assert list(of_batches[layer].values()) == pytest.approx(squares.tolist(), rel=1e-3, abs=1e-12)
        assert list(of_rows[layer].values()) == pytest.approx(apart[layer].tolist(), rel=1e-3, abs=1e-12)


def test_experts_in_few_bits_are_scored_as_they_are():
    model = esft.swap(tiny_model(), esft.ExpertSelection({}), frozen="int8")
    of_batches, _ = gradient_scores(model, BATCHES, batch_loss)
    stock = tiny_model()
    expected = by_autograd(stock, BATCHES)
    for layer in (1, 2):
        assert list(of_batches[layer].values()) == pytest.approx(expected[layer].tolist(), rel=0.2)


@pytest.mark.parametrize("training", [False, True])
def test_batches_are_asked_for_until_there_are_enough_tokens_and_the_mode_is_kept(training: bool):
    stock = tiny_model(attention_dropout=0.9)
    model, asked = esft.swap(stock, esft.ExpertSelection({})).train(training), []

    def batches():  # of 15 tokens
        for seed in range(4):
            asked.append(seed)
            yield collate(records(seed), 0)

    found = gradient_scores(model, batches(), batch_loss, max_tokens=16)
    assert asked == [0, 1] and model.training == training
    assert found == gradient_scores(model.eval(), [collate(records(seed), 0) for seed in (0, 1)], batch_loss)


def test_a_batch_without_a_supervised_token_is_no_batch():
    model = esft.swap(tiny_model(), esft.ExpertSelection({}))
    nothing = collate([Example([5, 6, 7], [IGNORE] * 3)], 0)
    assert gradient_scores(model, [nothing, *BATCHES], batch_loss) == gradient_scores(model, BATCHES, batch_loss)
    with pytest.raises(esft.InputError, match="^no gradients to score: no token of the data is supervised$"):
        gradient_scores(model, [nothing], batch_loss)


def test_what_cannot_be_scored_is_refused(monkeypatch):
    model = tiny_model()
    with pytest.raises(esft.InputError, match=r"mlp\.experts: gradients are scored of the experts of a swapped model$"):
        gradient_scores(model, BATCHES, batch_loss)
    esft.swap(model, esft.ExpertSelection({}))
    said = r"^layer 2: the gradient of expert \d is no finite number$"
    with pytest.raises(esft.InputError, match=said):
        gradient_scores(model, BATCHES, lambda m, b: (batch_loss(m, b)[0] * torch.nan, 1))
    monkeypatch.setattr(_Sums, "_squares", lambda *_: (torch.tensor(torch.inf), torch.zeros(())))
    with pytest.raises(esft.InputError, match=said):
        gradient_scores(model, BATCHES, batch_loss)


def test_gradients_of_16_bits_are_squared_in_32():
    model = esft.swap(tiny_model(dtype=torch.bfloat16), esft.ExpertSelection({}), "reference")
    (sums, exact), layer = (_Sums(moe_layers(model)[0]) for _ in "12"), moe_layers(model)[0]
    x_TD, grad_TD = (torch.randn(6, 32, generator=torch.Generator().manual_seed(n)).bfloat16() for n in (1, 2))
    index_TK, weights_TK = torch.tensor([[0, 3], [3, 5]] * 3), torch.rand(6, 2)
    sums.add(x_TD, index_TK, weights_TK, grad_TD)
    exact.add(x_TD.double(), index_TK, weights_TK.double(), grad_TD.double())
    assert layer.experts.trained_down_proj.dtype == torch.bfloat16 and exact.of_rows_E.any()
    torch.testing.assert_close(sums.of_batches_E, exact.of_batches_E, rtol=1e-5, atol=0)
    torch.testing.assert_close(sums.of_rows_E, exact.of_rows_E, rtol=1e-5, atol=0)


def test_experts_that_are_called_by_keywords_are_scored_alike():
    model = esft.swap(tiny_model(), esft.ExpertSelection({}))
    expected = gradient_scores(model, BATCHES, batch_loss)
    names = ("hidden_states", "top_k_index", "top_k_weights")
    for layer in moe_layers(model):
        layer.experts.register_forward_pre_hook(
            lambda _, args, kwargs: (args[:1], dict(zip(names[1:], args[1:], strict=True))), with_kwargs=True
        )
    assert gradient_scores(model, BATCHES, batch_loss) == expected


class Second(Ranks):
    """The second of two ranks; the other's numbers are this one's."""

    rank, size = 1, 2

    def sum(self, values):
        return 2 * values

    def totals(self, *values):
        return [2 * value for value in values]


def test_ranks_share_the_batches_and_add_up_what_they_have(monkeypatch):
    model = esft.swap(tiny_model(), esft.ExpertSelection({}))
    alone = gradient_scores(model, BATCHES[1:], batch_loss)
    monkeypatch.setattr("esft.scoring.gradients.current", Second)
    assert gradient_scores(model, BATCHES, batch_loss) == alone


def test_a_layer_that_only_another_rank_has_reached_has_scores(monkeypatch):
    class WithAnother(Second):
        def sum(self, values):
            return values + 1

        def totals(self, *values):
            return [value + 1 for value in values]

    monkeypatch.setattr("esft.scoring.gradients.current", WithAnother)
    of_batches, of_rows = gradient_scores(
        esft.swap(tiny_model(), esft.ExpertSelection({})), [collate(records(), 0)], batch_loss
    )
    assert of_batches == of_rows == {layer: dict.fromkeys(range(8), 1.0) for layer in (1, 2)}

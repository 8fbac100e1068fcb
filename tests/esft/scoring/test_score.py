import inspect
from types import SimpleNamespace

import pytest
import torch

import esft
from esft.data.batches import collate
from esft.data.examples import Example, joined
from esft.experts.moe_layers import GATE, moe_layers
from esft.parallel.ranks import Ranks
from esft.selection import ExpertSelection
from esft.training.auxiliary_losses import balance_losses
from tests.esft import zoo
from tests.esft.models import FAMILIES, tiny_model, token_batch


def by_hand(model, batches, limit: int) -> tuple[dict, dict]:
    """Token shares and mean gate values from router outputs recorded one token at a time."""
    counts = {layer.index: torch.zeros(8) for layer in moe_layers(model)}
    gates = {layer.index: torch.zeros(8) for layer in moe_layers(model)}
    seen = 0
    for batch in batches:
        outputs = {}
        hooks = [
            layer.router.register_forward_hook(lambda _, __, out, i=layer.index, o=outputs: o.update({i: out}))
            for layer in moe_layers(model)
        ]
        with torch.no_grad():
            model(**batch)
        for hook in hooks:
            hook.remove()
        for t, keep in enumerate(batch["attention_mask"].flatten().tolist()):
            if not keep or seen >= limit:
                continue
            seen += 1
            for index, (router_logits, _, chosen) in outputs.items():
                sigmoid = model.config.model_type == "deepseek_v3"
                values = router_logits[t].sigmoid() if sigmoid else router_logits[t].softmax(-1)
                for expert in chosen[t].tolist():
                    counts[index][expert] += 1
                    gates[index][expert] += values[expert]
    return {i: c / c.sum() for i, c in counts.items()}, {i: g / seen for i, g in gates.items()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("swapped", [False, True])
def test_scores_agree_with_a_count_by_hand_and_padding_never_counts(family: str, swapped: bool):
    model = tiny_model(family)
    batches = [token_batch(seed=1), token_batch(seed=2)]
    tokens, gates = by_hand(model, batches, limit=60)
    if swapped:
        esft.swap(model, ExpertSelection({2: [1, 4]}))
    scores = esft.score_experts(model, batches, max_tokens=60)
    assert list(scores.token_scores) == [layer.index for layer in moe_layers(model)]
    for index in tokens:
        assert scores.token_scores[index] == pytest.approx(dict(enumerate(tokens[index].tolist())), abs=1e-6)
        assert scores.gate_scores[index] == pytest.approx(dict(enumerate(gates[index].tolist())), abs=1e-5)
        assert sum(scores.token_scores[index].values()) == pytest.approx(1)


def test_one_expert_a_token_has_token_scores_and_gate_scores_only_where_the_family_tells(tmp_path):
    model, batch = zoo.tiny("qwen3_moe", num_experts_per_tok=1), {"input_ids": zoo.tokens()}
    chosen = {}
    for layer in moe_layers(model):
        layer.router.register_forward_hook(lambda _, __, out, i=layer.index: chosen.update({i: out[2].flatten()}))
    scores = esft.score_experts(model, [batch])
    for index, experts in chosen.items():
        expected = torch.bincount(experts, minlength=8) / 18
        assert scores.token_scores[index] == pytest.approx(dict(enumerate(expected.tolist())))
    assert scores.gate_scores == {}
    scores.save(tmp_path / "s.json")
    again = esft.ExpertScores.load(tmp_path / "s.json")
    again.check({0: 8, 1: 8})
    assert esft.select_experts(again, by="token").num_experts > 0
    with pytest.raises(esft.InputError, match="no gate scores to select by"):
        esft.select_experts(again, by="gate")
    assert esft.score_experts(zoo.tiny("zaya"), [batch]).gate_scores
    with (
        pytest.raises(esft.InputError, match="one expert a token do not tell their gate values"),
        balance_losses(model, torch.ones(2, 9)),
    ):
        model(**batch)


@pytest.mark.parametrize("training", [False, True])
def test_hooks_are_gone_and_the_mode_is_kept_even_after_an_error(training: bool):
    model = tiny_model().train(training)
    esft.score_experts(model, [token_batch()])
    assert all(m.training == training for m in model.modules())
    with pytest.raises(KeyError):
        esft.score_experts(model, [token_batch(), {"no tokens": 0}])
    assert all(m.training == training for m in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_dropout_is_off_and_no_gradient_or_cache_is_kept_while_scoring():
    model, batch = tiny_model(attention_dropout=0.9).train(), token_batch()
    calls = []
    model.model.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append((torch.is_grad_enabled(), kwargs)), with_kwargs=True
    )
    found = esft.score_experts(model, [batch])
    ((gradients, kwargs),) = calls
    assert not gradients
    assert kwargs["use_cache"] is False
    assert torch.equal(kwargs["input_ids"], batch["input_ids"])
    assert torch.equal(kwargs["attention_mask"], batch["attention_mask"])
    assert found == esft.score_experts(model.eval(), [batch])


@pytest.mark.parametrize("limit", [45, 46, 47])
def test_no_batch_is_asked_for_once_there_are_enough_tokens(limit: int):
    asked = []

    def batches():  # 46 tokens each
        for seed in range(3):
            asked.append(seed)
            yield token_batch(seed=seed)

    model = tiny_model()
    scores = esft.score_experts(model, batches(), max_tokens=limit)
    assert asked == ([0, 1] if limit > 46 else [0])
    tokens, _ = by_hand(model, [token_batch(seed=seed) for seed in range(3)], limit)
    assert scores.token_scores[1] == pytest.approx(dict(enumerate(tokens[1].tolist())), abs=1e-6)


def test_the_papers_sample_is_the_default():
    assert inspect.signature(esft.score_experts).parameters["max_tokens"].default == 32 * 4096


def test_batches_without_a_token_change_nothing_and_a_missing_mask_means_no_padding():
    model, first, second = tiny_model(), token_batch(seed=1), token_batch(seed=2)
    padding = {"input_ids": first["input_ids"], "attention_mask": torch.zeros(3, 17, dtype=torch.long)}
    first["input_ids"][0, :4] = 0  # the first token of the vocabulary is a token too
    whole = {"input_ids": first["input_ids"]}
    found = esft.score_experts(model, [padding, whole, padding, second])
    masked = whole | {"attention_mask": torch.ones(3, 17, dtype=torch.long)}
    tokens, gates = by_hand(model, [masked, second], limit=1000)
    for layer in (1, 2):
        assert found.token_scores[layer] == pytest.approx(dict(enumerate(tokens[layer].tolist())), abs=1e-6)
        assert found.gate_scores[layer] == pytest.approx(dict(enumerate(gates[layer].tolist())), abs=1e-5)
    with pytest.raises(esft.InputError, match="data set is empty"):
        esft.score_experts(model, [padding])


def test_batches_go_to_the_models_device():
    model, batch, asked = tiny_model(), token_batch(), []
    elsewhere = {
        name: SimpleNamespace(to=lambda device, name=name, t=tensor: asked.append((name, device)) or t)
        for name, tensor in batch.items()
    }
    assert esft.score_experts(model, [elsewhere]) == esft.score_experts(model, [batch])
    assert asked == [("input_ids", model.device), ("attention_mask", model.device)]


def test_experts_of_images_that_see_no_token_have_no_scores():
    scores = esft.score_experts(zoo.tiny("ernie4_5_vl_moe"), [{"input_ids": zoo.tokens()}])
    assert list(scores.token_scores) == list(scores.gate_scores) == [0, 2]  # those of text


def test_slots_that_no_expert_took_do_not_count(monkeypatch):
    model, batch = tiny_model("mixtral"), token_batch(rows=1)
    # So that the weights need not tell the gate function, as those of empty slots do not.
    monkeypatch.setitem(GATE, "mixtral", "softmax")
    seen = {}

    def drop_the_second_choice(module, args):
        hidden, index, weights = args
        seen[module] = index[:12]
        return hidden, index, weights * torch.tensor([1.0, 0.0])

    for layer in moe_layers(model):
        layer.experts.register_forward_pre_hook(drop_the_second_choice)
        layer.router.register_forward_hook(lambda module, _, out: seen.update({module: out[0][:12].softmax(-1)}))
    scores = esft.score_experts(model, [batch])
    for layer in moe_layers(model):
        first = seen[layer.experts][:, 0].tolist()
        expected = {e: first.count(e) / 12 for e in range(8)}
        assert scores.token_scores[layer.index] == pytest.approx(expected, abs=1e-12)
        gates = dict.fromkeys(range(8), 0.0)
        for token, expert in enumerate(first):
            gates[expert] += float(seen[layer.router][token, expert]) / 12
        assert scores.gate_scores[layer.index] == pytest.approx(gates, abs=1e-6)


def test_an_empty_data_set_is_refused():
    with pytest.raises(esft.InputError, match="data set is empty"):
        esft.score_experts(tiny_model(), [])


def test_a_model_without_moe_layers_is_refused():
    with pytest.raises(esft.InputError, match="Linear has no MoE layers"):
        esft.score_experts(torch.nn.Linear(2, 2), [token_batch()])


def test_nothing_after_the_last_router_runs_from_the_second_batch_on():
    model = tiny_model()
    ran: list[str] = []
    model.model.norm.register_forward_hook(lambda *args: ran.append("norm"))
    model.lm_head.register_forward_hook(lambda *args: ran.append("head"))
    batches = [token_batch(seed=seed) for seed in range(3)]
    together = esft.score_experts(model, batches)
    assert ran == ["norm"]
    apart = [esft.score_experts(model, [batch]) for batch in batches]
    tokens = [int(batch["attention_mask"].sum()) for batch in batches]
    for layer, scores in together.token_scores.items():
        for expert, score in scores.items():
            mean = sum(n * one.token_scores[layer][expert] for n, one in zip(tokens, apart, strict=True)) / sum(tokens)
            assert score == pytest.approx(mean, abs=1e-12)


def test_counts_are_added_up_over_all_ranks(monkeypatch):
    class Alike(Ranks):
        """One of two ranks, of which the other counts what this one does."""

        def sum(self, values):
            return 2 * values

    alone = esft.score_experts(tiny_model(), [token_batch()])
    monkeypatch.setattr("esft.scoring.score.current", Alike)
    both = esft.score_experts(tiny_model(), [token_batch()])
    assert both.token_scores == alone.token_scores
    for layer, scores in alone.gate_scores.items():
        assert both.gate_scores[layer] == {expert: pytest.approx(2 * score) for expert, score in scores.items()}


def test_ranks_share_the_batches_and_what_one_cannot_tell_is_left_out(monkeypatch):
    class Second(Ranks):
        rank, size, unknown = 1, 2, 0

        def sum(self, values):
            other = torch.zeros_like(values)
            other[3] = self.unknown  # of another rank, whose gate values cannot be told
            return values + other

    batches = [token_batch(seed=seed) for seed in range(4)]
    odd = esft.score_experts(tiny_model(), batches[1::2])
    monkeypatch.setattr("esft.scoring.score.current", Second)
    found = esft.score_experts(tiny_model(), batches)
    assert found.token_scores == odd.token_scores and list(found.gate_scores) == [1, 2]
    monkeypatch.setattr(Second, "unknown", 1)
    found = esft.score_experts(tiny_model(), batches)
    assert found.token_scores == odd.token_scores and not found.gate_scores


@pytest.mark.parametrize("progress", [True, False])
def test_a_bar_counts_the_tokens_where_progress_is_to_be_seen(capsys, progress: bool):
    batch = token_batch()
    limit = int(batch["attention_mask"].sum()) + 5
    esft.score_experts(tiny_model(), [batch, batch], max_tokens=limit, progress=progress)
    shown = capsys.readouterr().err
    assert (f"{limit}/{limit}" in shown and "100%" in shown) if progress else not shown


def test_documents_that_share_a_row_have_the_scores_that_they_have_each_alone():
    drawn = torch.Generator().manual_seed(0)
    documents = [Example(ids := torch.randint(0, 256, (n,), generator=drawn).tolist(), ids) for n in (5, 9, 3)]
    model = tiny_model()
    alone = esft.score_experts(model, [collate([document], 258) for document in documents])
    together = esft.score_experts(model, [collate([joined(documents), documents[0]], 258), collate(documents[1:], 258)])
    packed = esft.score_experts(model, [collate([joined(documents)], 258)])
    assert packed.token_scores == alone.token_scores
    assert packed.token_scores != esft.score_experts(model, [_without_documents(documents)]).token_scores
    for layer, scores in packed.gate_scores.items():
        assert scores == pytest.approx(alone.gate_scores[layer])
    # The row twice, with padding behind it: the same shares.
    for layer, scores in together.token_scores.items():
        assert scores == pytest.approx(alone.token_scores[layer])


def _without_documents(documents: list[Example]) -> dict:
    batch = collate([joined(documents)], 258)
    return {name: batch[name] for name in ("input_ids", "attention_mask")}

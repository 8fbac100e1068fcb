import pytest
import torch
from esft.balance import balance_losses
from esft.families import moe_layers
from esft.select import ExpertSelection

import esft
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


def test_hooks_are_gone_and_the_mode_is_kept():
    model = tiny_model().train()
    esft.score_experts(model, [token_batch()])
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_an_empty_data_set_is_refused():
    with pytest.raises(esft.InputError, match="data set is empty"):
        esft.score_experts(tiny_model(), [])


def test_score_files_round_trip(tmp_path):
    scores = esft.score_experts(tiny_model(), [token_batch()])
    scores.save(tmp_path / "s.json")
    assert esft.ExpertScores.load(tmp_path / "s.json") == scores


@pytest.mark.parametrize("text", ["{", "[]", '{"token_scores": {"a": {}}}', '{"token_scores": {"1": {"0": 1}}}'])
def test_a_file_that_holds_no_scores_is_refused_by_name(tmp_path, text: str):
    (tmp_path / "s.json").write_text(text)
    with pytest.raises(esft.InputError, match="s.json"):
        esft.ExpertScores.load(tmp_path / "s.json")


def test_scores_of_another_model_are_refused():
    scores = esft.score_experts(tiny_model(), [token_batch()])
    scores.check({1: 8, 2: 8})
    with pytest.raises(esft.InputError, match="score file is of another model: it has layers 1-2 with"):
        scores.check({1: 8, 2: 8, 3: 8})


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

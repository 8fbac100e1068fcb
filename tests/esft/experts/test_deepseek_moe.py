import pytest
import torch
from torch import Tensor

from esft.experts.deepseek_moe import DeepSeekMoE, GatedMLP, Router, RouterConfig
from esft.experts.moe_layers import moe_layers
from esft.experts.pooled_experts import Experts
from tests.esft.models import tiny_model

CONFIGS = {
    "deepseek_v2": RouterConfig(8, 3, "softmax", num_groups=2, topk_group=1, scale=2.0),
    "deepseek_v3": RouterConfig(8, 3, "sigmoid", num_groups=2, topk_group=1, normalise=True, scale=2.5),
    "qwen2_moe": RouterConfig(8, 3),
    "qwen3_moe": RouterConfig(8, 3, normalise=True),
}


@pytest.mark.parametrize("family", CONFIGS)
def test_router_chooses_and_weighs_as_transformers_does(family: str):
    gate = moe_layers(tiny_model(family))[0].router
    router = Router(CONFIGS[family], 32)
    router.load_state_dict(gate.state_dict())
    x = torch.randn(50, 32)
    _, their_weights, their_index = gate(x)
    index, weights = router(x)
    dense = torch.zeros(2, 50, 8)
    dense[0].scatter_(1, index, weights)
    dense[1].scatter_(1, their_index, their_weights)
    torch.testing.assert_close(dense[0], dense[1])


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
@pytest.mark.parametrize("trained", [[], [6, 1], list(range(8))])
def test_the_slim_block_equals_the_transformers_block(family: str, trained: list[int]):
    block = moe_layers(tiny_model(family))[0].block
    ours = DeepSeekMoE(32, 20, CONFIGS[family], num_shared=1, trained=trained)
    ours.gate.load_state_dict(block.gate.state_dict())
    ours.experts = Experts(block.experts.gate_up_proj, block.experts.down_proj, trained)
    assert ours.shared_experts is not None
    ours.shared_experts.load_state_dict(block.shared_experts.state_dict())
    x = torch.randn(2, 9, 32)
    torch.testing.assert_close(ours(x), block(x), atol=1e-5, rtol=1e-4)


def chosen(router: Router, x: Tensor) -> dict[int, float]:
    """What one token gets: expert -> weight."""
    index, weights = router(x[None])
    assert index.shape == weights.shape == (1, router.config.top_k) and weights.dtype == torch.float32
    return dict(zip(index[0].tolist(), weights[0].tolist(), strict=True))


def router_for(scores: list[float], bias: list[float] | None = None, **settings) -> tuple[Router, Tensor]:
    """A router, and the token to which it gives these scores."""
    p = torch.tensor(scores, dtype=torch.float64)
    router = Router(RouterConfig(len(scores), **settings), len(scores))
    router.weight.data = torch.eye(len(scores))
    if bias is not None:
        router.e_score_correction_bias.copy_(torch.tensor(bias))
    return router, (p.log() if router.config.scoring == "softmax" else torch.logit(p)).float()


SOFT = [0.30, 0.02, 0.20, 0.16, 0.25, 0.07]  # three groups of two: best 0, 4, 2; summed the middle one leads
SIGMOID = [0.6, 0.1, 0.1, 0.4, 0.35, 0.05, 0.3, 0.3, 0.29]  # three groups of three: only two best together put 1 first


@pytest.mark.parametrize(
    ("scores", "bias", "settings", "expected"),
    [
        ([0.1, 0.2, 0.3, 0.4], None, {"top_k": 2}, {3: 0.4, 2: 0.3}),
        ([0.1, 0.2, 0.3, 0.4], None, {"top_k": 2, "scale": 2.5}, {3: 1.0, 2: 0.75}),
        ([0.1, 0.2, 0.3, 0.4], None, {"top_k": 2, "normalise": True}, {3: 4 / 7, 2: 3 / 7}),
        ([0.1, 0.2, 0.3, 0.4], None, {"top_k": 2, "normalise": True, "scale": 7.0}, {3: 4.0, 2: 3.0}),
        ([0.1, 0.2, 0.3, 0.4], None, {"top_k": 4}, {0: 0.1, 1: 0.2, 2: 0.3, 3: 0.4}),
        (SOFT, None, {"top_k": 2, "num_groups": 3, "topk_group": 1}, {0: 0.30, 1: 0.02}),
        (SOFT, None, {"top_k": 3, "num_groups": 3, "topk_group": 2}, {0: 0.30, 4: 0.25, 5: 0.07}),
        (SOFT, None, {"top_k": 3, "num_groups": 3, "topk_group": 3}, {0: 0.30, 4: 0.25, 2: 0.20}),
        ([0.9, 0.8, 0.7], None, {"top_k": 2, "scoring": "sigmoid"}, {0: 0.9, 1: 0.8}),
        ([0.9, 0.8, 0.7], [0, 0, 0.15], {"top_k": 2, "scoring": "sigmoid"}, {0: 0.9, 2: 0.7}),
        ([0.9, 0.8, 0.7], [0, 0, 0.3], {"top_k": 2, "scoring": "sigmoid", "normalise": True}, {0: 0.5625, 2: 0.4375}),
        (SIGMOID, None, {"top_k": 2, "scoring": "sigmoid", "num_groups": 3, "topk_group": 1}, {3: 0.4, 4: 0.35}),
        # The bias moves the choice of groups too; an expert with a choice below zero still goes before one barred.
        (
            [0.5, 0.4, 0.6, 0.5], [0.5, -0.6, 0, 0],
            {"top_k": 2, "scoring": "sigmoid", "num_groups": 2, "topk_group": 1}, {2: 0.6, 3: 0.5},
        ),
        (
            [0.5, 0.4, 0.3, 0.2], [0.7, -0.6, 0, 0],
            {"top_k": 2, "scoring": "sigmoid", "num_groups": 2, "topk_group": 1}, {0: 0.5, 1: 0.4},
        ),
        # Groups of one expert have no two best.
        ([0.3, 0.6, 0.5], None, {"top_k": 1, "scoring": "sigmoid", "num_groups": 3, "topk_group": 2}, {1: 0.6}),
    ],
)  # fmt: skip
def test_router_chooses_and_weighs_as_worked_out_by_hand(scores: list, bias, settings: dict, expected: dict):
    assert chosen(*router_for(scores, bias, **settings)) == pytest.approx(expected, rel=1e-5)


def test_every_token_chooses_for_itself():
    router, x = router_for([0.1, 0.2, 0.3, 0.4], top_k=2)
    index, _ = router(torch.stack([x, -x, x.flip(0)]))
    assert [set(row) for row in index.tolist()] == [{3, 2}, {0, 1}, {0, 1}]


def test_scores_that_are_all_zero_are_not_divided_by_their_sum():
    router, _ = router_for([0.5, 0.5, 0.5], top_k=2, scoring="sigmoid", normalise=True)
    _, weights = router(torch.full((1, 3), -200.0))
    assert torch.equal(weights, torch.zeros(1, 2))


def test_small_scores_are_divided_by_their_sum_too():
    router, _ = router_for([0.5, 0.5, 0.5], top_k=2, scoring="sigmoid", normalise=True)
    _, weights = router(torch.full((1, 3), -20.0))  # scores of 2e-9
    torch.testing.assert_close(weights, torch.full((1, 2), 0.5))


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_router_scores_in_float32_whatever_it_is_given(scoring: str):
    router = Router(RouterConfig(8, 8, scoring), 16).bfloat16()
    x = torch.randn(5, 16).bfloat16()
    index, weights = router(x)
    logits = x.float() @ router.weight.float().T
    scores = logits.softmax(1) if scoring == "softmax" else logits.sigmoid()
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights, scores.gather(1, index))


def test_a_routers_weights_start_small_and_only_sigmoids_have_a_correction():
    router = Router(RouterConfig(64, 2), 256)
    assert router.weight.shape == (64, 256)
    assert router.weight.std().item() == pytest.approx(1 / 16, rel=0.05)
    assert abs(router.weight.mean().item()) < 0.005
    assert router.e_score_correction_bias is None and set(router.state_dict()) == {"weight"}
    router = Router(RouterConfig(64, 2, "sigmoid"), 256)
    assert torch.equal(router.e_score_correction_bias, torch.zeros(64))
    assert set(router.state_dict()) == {"weight", "e_score_correction_bias"}
    assert [name for name, _ in router.named_parameters()] == ["weight"]


def test_a_gradient_reaches_the_router_through_the_weights():
    router, x = router_for([0.1, 0.2, 0.3, 0.4], top_k=1)
    _, weights = router(x[None])
    weights.sum().backward()
    p = torch.tensor([0.1, 0.2, 0.3, 0.4])
    expected = 0.4 * (torch.tensor([0.0, 0, 0, 1]) - p)[:, None] * x  # of a softmax's fourth value
    torch.testing.assert_close(router.weight.grad, expected)


def test_gated_mlp_is_down_of_silu_of_gate_times_up():
    mlp, x = GatedMLP(6, 4), torch.randn(2, 3, 6)
    shapes = {"gate_proj.weight": (4, 6), "up_proj.weight": (4, 6), "down_proj.weight": (6, 4)}
    assert {name: tuple(p.shape) for name, p in mlp.named_parameters()} == shapes
    gate, up = x @ mlp.gate_proj.weight.T, x @ mlp.up_proj.weight.T
    torch.testing.assert_close(mlp(x), (gate * gate.sigmoid() * up) @ mlp.down_proj.weight.T)


def test_block_without_shared_experts_and_without_tokens():
    block = DeepSeekMoE(16, 8, RouterConfig(4, 2), trained=[1])
    assert block.shared_experts is None
    assert block(torch.randn(0, 16)).shape == (0, 16)
    assert block(torch.randn(3, 16)).shape == (3, 16)
    x = torch.randn(2, 3, 5, 16)
    torch.testing.assert_close(block(x), block(x.view(-1, 16)).view(2, 3, 5, 16))


def test_block_is_made_of_the_sizes_that_it_was_told():
    block = DeepSeekMoE(64, 16, RouterConfig(32, 3), num_shared=3, trained=[7, 1], backend="reference")
    assert block.gate.config == RouterConfig(32, 3) and block.gate.weight.shape == (32, 64)
    assert (block.experts.trained, block.experts.backend, block.experts.recompute) == ((7, 1), "reference", "none")
    gate_up, down = block.experts.stacked()
    assert gate_up.shape == (32, 32, 64) and down.shape == (32, 64, 16)
    for weights, std in ((gate_up, 64**-0.5), (down, 16**-0.5)):
        assert weights.std().item() == pytest.approx(std, rel=0.05)
        assert abs(weights.mean().item()) < 0.05 * std
    assert block.shared_experts.up_proj.weight.shape == (48, 64)
    plain = DeepSeekMoE(64, 16, RouterConfig(32, 3))
    assert plain.shared_experts is None and plain.experts.trained == () and plain.experts.backend == "auto"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scoring": "tanh"}, "scoring must be 'softmax' or 'sigmoid', got 'tanh'"),
        ({"top_k": 9}, r"top_k must be in 1\.\.8 \(the number of experts\), got 9"),
        ({"top_k": 0}, r"top_k must be in 1\.\.8 \(the number of experts\), got 0"),
        ({"num_groups": 3}, "num_experts 8 is not a multiple of num_groups 3"),
        ({"num_groups": 2, "topk_group": 3}, r"topk_group must be in 1\.\.2 \(the number of groups\), got 3"),
        ({"num_groups": 2, "topk_group": 0}, r"topk_group must be in 1\.\.2 \(the number of groups\), got 0"),
        ({"num_groups": 4, "topk_group": 1, "top_k": 3}, "top_k 3 exceeds the experts in topk_group 1 groups"),
        ({"num_groups": 4, "topk_group": 2, "top_k": 5}, "top_k 5 exceeds the experts in topk_group 2 groups"),
    ],
)
def test_impossible_router_settings_are_refused(settings: dict, message: str):
    with pytest.raises(ValueError, match=f"^{message}"):
        RouterConfig(**({"num_experts": 8, "top_k": 2} | settings))


@pytest.mark.parametrize(
    "settings",
    [
        {"top_k": 1},
        {"top_k": 8},
        {"num_groups": 8, "topk_group": 2},
        {"num_groups": 4, "topk_group": 4, "top_k": 8},
        {"num_groups": 4, "topk_group": 1, "top_k": 2},
        {"scoring": "sigmoid"},
    ],
)
def test_router_settings_at_the_edge_of_what_is_possible_are_taken(settings: dict):
    config = RouterConfig(**({"num_experts": 8, "top_k": 2} | settings))
    assert all(getattr(config, name) == value for name, value in settings.items())


def test_a_router_config_left_alone_is_a_plain_softmax():
    assert RouterConfig(8, 2) == RouterConfig(8, 2, "softmax", 1, 1, False, 1.0)

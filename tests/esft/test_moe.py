import pytest
import torch
from esft.families import moe_layers

from esft.moe import DeepSeekMoE, Experts, Router, RouterConfig
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


def test_block_without_shared_experts_and_without_tokens():
    block = DeepSeekMoE(16, 8, RouterConfig(4, 2), trained=[1])
    assert block(torch.randn(0, 16)).shape == (0, 16)
    assert block(torch.randn(3, 16)).shape == (3, 16)


def test_stacked_gives_the_weights_back_in_expert_order():
    gate_up, down = torch.randn(5, 6, 4), torch.randn(5, 4, 3)
    experts = Experts(gate_up, down, [3, 0])
    assert torch.equal(experts.trained_down_proj, down[[3, 0]])
    assert torch.equal(experts.frozen_down_proj, down[[1, 2, 4]])
    assert all(torch.equal(a, b) for a, b in zip(experts.stacked(), (gate_up, down), strict=True))


@pytest.mark.parametrize("trained", [[4], [-1], [1, 1]])
def test_impossible_trained_experts_are_refused(trained: list[int]):
    with pytest.raises(ValueError, match="trained experts"):
        Experts(torch.randn(4, 6, 4), torch.randn(4, 4, 3), trained)


@pytest.mark.parametrize(
    "settings",
    [
        {"scoring": "tanh"},
        {"top_k": 9},
        {"top_k": 0},
        {"num_groups": 3},
        {"num_groups": 2, "topk_group": 3},
        {"num_groups": 4, "topk_group": 1, "top_k": 3},
    ],
)
def test_impossible_router_settings_are_refused(settings: dict):
    with pytest.raises(ValueError):
        RouterConfig(**({"num_experts": 8, "top_k": 2} | settings))

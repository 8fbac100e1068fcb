import torch
from esft.config import TrainConfig
from esft.optim import MasterAdamW
from torch import nn


def test_float32_parameters_move_as_under_plain_adamw():
    ours, theirs = nn.Linear(4, 3), nn.Linear(4, 3)
    theirs.load_state_dict(ours.state_dict())
    optimizer = MasterAdamW(ours.named_parameters(), TrainConfig())
    plain = torch.optim.AdamW(theirs.parameters(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)
    x = torch.randn(5, 4)
    for _ in range(3):
        ours(x).square().sum().backward()
        norm = optimizer.step(0.01)
        theirs(x).square().sum().backward()
        expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        plain.step()
        plain.zero_grad()
        assert abs(norm - expected.item()) < 1e-4 * norm
    torch.testing.assert_close(ours.weight, theirs.weight)


def test_steps_too_small_for_bf16_add_up_in_the_master():
    weight = nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    optimizer = MasterAdamW([("w", weight)], TrainConfig(weight_decay=0.0))
    for _ in range(30):
        weight.grad = torch.ones_like(weight)
        optimizer.step(1e-3)
    assert torch.allclose(optimizer.masters["w"], torch.full((8,), 0.97), atol=1e-4)
    assert torch.allclose(weight.float(), torch.full((8,), 0.97), atol=4e-3)


def test_state_restores_the_same_course():
    def run(optimizer: MasterAdamW, weight: nn.Parameter, steps: range) -> None:
        for step in steps:
            weight.grad = torch.full_like(weight, 1.0 + step)
            optimizer.step(0.01)

    first = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    whole = MasterAdamW([("w", first)], TrainConfig())
    run(whole, first, range(3))
    state = {name: tensor.clone() for name, tensor in whole.state().items()}
    run(whole, first, range(3, 6))
    second = nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
    resumed = MasterAdamW([("w", second)], TrainConfig())
    resumed.load_state(state)
    run(resumed, second, range(3, 6))
    assert torch.equal(whole.masters["w"], resumed.masters["w"])
    assert torch.equal(first, second)

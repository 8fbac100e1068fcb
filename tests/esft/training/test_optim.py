import pytest
import torch
from torch import nn

from esft.errors import InputError
from esft.runs.config import TrainConfig
from esft.training.optim import MasterAdamW

SIZES = (20.0, 0.01, 0.5)  # of three steps' gradients: the first alone is beyond the default clip


def gradients(*shape: int) -> list[torch.Tensor]:
    """One of each of ``SIZES``, as norm; exact in bfloat16, so that casting them changes nothing."""
    drawn = (torch.randn(*shape) for _ in SIZES)
    return [(size * g / g.norm()).bfloat16() for size, g in zip(SIZES, drawn, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "settings", [{}, {"clip": 0.1}, {"weight_decay": 0.0}, {"weight_decay": 0.7}, {"beta1": 0.5}, {"beta2": 0.5}]
)
def test_parameters_move_as_float32_copies_of_them_under_plain_clipped_adamw(dtype: torch.dtype, settings: dict):
    config = TrainConfig(**settings)
    ours = {name: nn.Parameter(torch.randn(4, 3).to(dtype)) for name in ("a", "b")}
    theirs = {name: nn.Parameter(p.detach().float().clone()) for name, p in ours.items()}
    optimizer = MasterAdamW(ours.items(), config)
    plain = torch.optim.AdamW(
        theirs.values(), lr=1.0, betas=(config.beta1, config.beta2), weight_decay=config.weight_decay
    )
    # Adam makes nothing of one factor on all gradients. That clipping touches some steps only shows in their ratio.
    for step, (a, b) in enumerate(zip(gradients(4, 3), gradients(4, 3), strict=True)):
        rate = 0.01 * (step + 1)
        for name, gradient in (("a", a), ("b", b)):
            ours[name].grad, theirs[name].grad = gradient.to(dtype), gradient.float()
        expected = torch.nn.utils.clip_grad_norm_(theirs.values(), config.clip)
        plain.param_groups[0]["lr"] = rate
        plain.step()
        assert optimizer.step(rate) == pytest.approx(expected.item(), rel=1e-6)
        assert all(p.grad is None for p in ours.values())
        assert all(m.grad is None for m in optimizer.masters.values())
    state = optimizer.state()
    assert not any(tensor.requires_grad for tensor in state.values())
    for name, p in theirs.items():
        torch.testing.assert_close(state[f"master/{name}"], p.detach(), rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(state[f"exp_avg/{name}"], plain.state[p]["exp_avg"], rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(state[f"exp_avg_sq/{name}"], plain.state[p]["exp_avg_sq"], rtol=1e-5, atol=1e-10)
        assert torch.equal(ours[name].detach(), state[f"master/{name}"].to(dtype))


def test_the_norm_is_that_of_all_gradients_before_they_are_clipped_to_the_largest():
    first, second = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    optimizer = MasterAdamW([("first", first), ("second", second)], TrainConfig(clip=2.0, beta1=0.5))
    first.grad, second.grad = torch.tensor([6.0]), torch.tensor([8.0])
    norm = optimizer.step(0.1)
    assert type(norm) is float and norm == 10.0
    # Clipped to 2 the gradients are 1.2 and 1.6, and half of each enters its mean.
    state = optimizer.state()
    assert state["exp_avg/first"].item() == pytest.approx(0.6, rel=1e-5)
    assert state["exp_avg/second"].item() == pytest.approx(0.8, rel=1e-5)


def test_steps_too_small_for_bf16_add_up_in_the_master():
    weight = nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    optimizer = MasterAdamW([("w", weight)], TrainConfig(weight_decay=0.0))
    for _ in range(30):
        weight.grad = torch.ones_like(weight)
        optimizer.step(1e-3)
    assert torch.allclose(optimizer.masters["w"], torch.full((8,), 0.97), atol=1e-4)
    assert torch.equal(weight.detach(), optimizer.masters["w"].bfloat16())


def test_a_float32_parameter_is_its_own_master_and_another_has_a_float32_copy():
    named = {"full": nn.Parameter(torch.ones(2)), "half": nn.Parameter(torch.ones(2, dtype=torch.float16))}
    masters = MasterAdamW(named.items(), TrainConfig()).masters
    assert masters["full"] is named["full"]
    assert masters["half"].dtype == torch.float32 and torch.equal(masters["half"], torch.ones(2))


def test_what_does_not_train_and_what_has_no_elements_is_passed_over():
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    trained, empty = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(0, 2))
    optimizer = MasterAdamW([("frozen", frozen), ("empty", empty), ("trained", trained)], TrainConfig())
    frozen.grad, trained.grad = torch.ones(2), torch.ones(2)
    assert optimizer.step(0.1) == pytest.approx(2**0.5)
    assert optimizer.state().keys() == {f"{key}/trained" for key in ("master", "step", "exp_avg", "exp_avg_sq")}
    assert torch.equal(frozen, torch.ones(2)) and not torch.equal(trained, torch.ones(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_parameter_without_a_gradient_stays_and_one_of_an_earlier_step_is_not_used_again(dtype: torch.dtype):
    still, moved = (nn.Parameter(torch.ones(2, dtype=dtype)) for _ in range(2))
    optimizer = MasterAdamW([("still", still), ("moved", moved)], TrainConfig())
    moved.grad = torch.ones_like(moved)
    optimizer.step(0.1)
    assert torch.equal(still.detach(), torch.ones(2, dtype=dtype))
    assert "exp_avg/still" not in optimizer.state()
    after = moved.detach().clone()
    assert optimizer.step(0.1) == 0.0
    assert torch.equal(moved.detach(), after) and not torch.equal(after, torch.ones(2, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("done", [0, 3])
def test_state_restores_the_same_course(dtype: torch.dtype, done: int):
    def run(optimizer: MasterAdamW, weight: nn.Parameter, steps: range) -> None:
        for step in steps:
            weight.grad = torch.full_like(weight, 1.0 + step)
            optimizer.step(0.01)

    first = nn.Parameter(torch.ones(4, dtype=dtype))
    whole = MasterAdamW([("w", first)], TrainConfig())
    run(whole, first, range(done))
    state = {name: tensor.clone() for name, tensor in whole.state().items()}
    before = first.detach().clone()
    run(whole, first, range(done, 6))
    second = nn.Parameter(torch.zeros(4, dtype=dtype))
    resumed = MasterAdamW([("w", second)], TrainConfig())
    resumed.load_state(state)
    assert torch.equal(second.detach(), before)
    run(resumed, second, range(done, 6))
    assert torch.equal(whole.masters["w"], resumed.masters["w"])
    assert torch.equal(first, second)
    for key, tensor in whole.state().items():
        assert torch.equal(tensor, resumed.state()[key]), key


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("master/b"), "tensor master/b is missing"),
        (lambda s: s.pop("exp_avg/a"), "tensor exp_avg/a is missing"),
        (lambda s: s.pop("step/a"), "tensor step/a is missing"),
        (lambda s: s.update({"master/c": torch.zeros(1)}), "tensor master/c is none that trains"),
        (lambda s: s.update({"exp_avg/c": torch.zeros(1)}), "tensor exp_avg/c is none that trains"),
        (lambda s: s.update({"master/a": torch.zeros(1)}), r"master/a is torch.float32 \(1,\), not float32 \(2, 3\)"),
        (lambda s: s.update({"exp_avg/a": torch.zeros(1, 3)}), r"exp_avg/a is torch.float32 \(1, 3\), not float32"),
        (lambda s: s.update({"exp_avg_sq/a": torch.zeros(3, 2)}), r"exp_avg_sq/a is torch.float32 \(3, 2\), not"),
        (lambda s: s.update({"step/a": torch.zeros(1)}), r"step/a is torch.float32 \(1,\), not float32 \(\)"),
        (
            lambda s: s.update({"master/a": torch.zeros(2, 3).half()}),
            r"master/a is torch.float16 \(2, 3\), not",
        ),
        (lambda s: s["exp_avg/a"].fill_(torch.nan), "exp_avg/a holds values that are not finite"),
        (lambda s: s["master/b"].fill_(torch.inf), "master/b holds values that are not finite"),
    ],
)
def test_a_state_that_is_none_of_these_parameters_is_named_and_changes_nothing(change, message: str):
    def made() -> MasterAdamW:
        named = {"a": nn.Parameter(torch.ones(2, 3)), "b": nn.Parameter(torch.ones(4))}
        return MasterAdamW(named.items(), TrainConfig())

    trained = made()
    trained.params["a"].grad = torch.ones(2, 3)
    trained.step(0.1)
    state = {name: tensor.clone() for name, tensor in trained.state().items()}
    assert state.keys() == {"master/a", "master/b", "step/a", "exp_avg/a", "exp_avg_sq/a"}
    made().load_state(state)
    fresh = made()
    change(state)
    with pytest.raises(InputError, match=message):
        fresh.load_state(state)
    assert all(torch.equal(p, torch.ones_like(p)) for p in fresh.params.values()) and not fresh.adam.state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_parameter_that_is_no_longer_finite_is_named(dtype: torch.dtype):
    named = [(name, nn.Parameter(torch.ones(3, dtype=dtype))) for name in ("a", "b")]
    optimizer = MasterAdamW(named, TrainConfig())
    assert optimizer.overflowed() is None
    for value in (torch.nan, torch.inf):
        named[1][1].data[2] = value
        assert optimizer.overflowed() == "b"

import itertools
import math

import pytest
import torch

pytest.importorskip("triton")
from triton.language import int32
from triton.runtime import interpreter

from esft_kernels import adamw as op
from tests.esft_kernels.adamw import KINDS, assert_stepped, made, step_in_float64, value_of
from tests.esft_kernels.bounds import check_bounds, poison_masked, sparse


@pytest.fixture(autouse=True)
def _strict(monkeypatch):
    poison_masked(monkeypatch)
    check_bounds(monkeypatch)


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize(("kind", "count"), [*itertools.product(KINDS, [1, 33]), ("bf16", 64)])
def test_every_step_is_that_of_adamw_in_float64(kind: str, count: int, weight_decay: float, monkeypatch):
    monkeypatch.setattr(op, "_BLOCK", 16)
    state, settings = made(kind, count), {"lr": 0.02, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8}
    settings["weight_decay"] = weight_decay
    for step in range(1, 6):
        # Sizes for which the moments' sums round, and one that leaves epsilon alone to divide by.
        gradient = torch.randn(count).mul(10.0 ** (step % 4 - 3) * (step != 4)).to(state.gradient)
        shrink = torch.tensor(0.3 if step % 2 else 1.0)
        expected = step_in_float64(state, gradient, float(shrink), step, **settings)
        kept = gradient.clone()
        op.adamw_step(state.weight, state.beside, gradient, state.mean, state.square, shrink, step, **settings)
        assert torch.equal(gradient, kept)
        assert_stepped(state, expected)


@pytest.mark.parametrize("betas", [(0.0, 0.0), (0.5, 0.999)])
def test_betas_are_those_that_are_given(betas):
    state, settings = made("fp32", 20), {"lr": 0.02, "beta1": betas[0], "beta2": betas[1], "eps": 1e-3}
    for step in (1, 2, 1000):
        gradient, shrink = torch.randn(20), torch.tensor(1.0)
        expected = step_in_float64(state, gradient, 1.0, step, **settings, weight_decay=0.1)
        op.adamw_step(
            state.weight, None, gradient, state.mean, state.square, shrink, step, **settings, weight_decay=0.1
        )  # fmt: skip
        assert_stepped(state, expected)


def test_a_weight_is_rounded_to_the_nearest_with_what_is_low_beside_it():
    """One ulp about a value at which the upper half of a float32 goes up."""
    bits = torch.tensor([0x3F807FFF, 0x3F808000, 0x3F808001, 0x3FFFFFFF, -0x407F8000], dtype=torch.int32)
    values = bits.view(torch.float32)
    state = made("bf16", len(values), values)
    zeros = torch.zeros(len(values))
    op.adamw_step(
        state.weight, state.beside, zeros.bfloat16(), state.mean, state.square, torch.tensor(1.0), 1,
        lr=0.1, beta1=0.9, beta2=0.95, weight_decay=0.0, eps=1e-8,
    )  # fmt: skip
    assert torch.equal(value_of(state), values)  # a step of nothing
    assert state.weight.view(torch.int16).tolist() == [0x3F80, 0x3F81, 0x3F81, 0x4000, -0x407F]


class LastBlock:
    """A kernel that is launched for its last program alone."""

    def __init__(self, kernel, monkeypatch):
        self.kernel, self.monkeypatch = kernel, monkeypatch

    def __getitem__(self, grid):
        last = interpreter.TensorHandle(torch.tensor([grid[0] - 1], dtype=torch.int32).numpy(), int32)
        self.monkeypatch.setattr(interpreter.InterpreterBuilder, "create_get_program_id", lambda *_: last)
        return self.kernel[(1,)]


@pytest.mark.parametrize("kind", ["bf16", "fp32"])
def test_elements_past_what_32_bit_offsets_reach(kind: str, tmp_path, monkeypatch):
    count, few = 2**31 + 5, 5
    settings = {"lr": 0.02, "beta1": 0.9, "beta2": 0.95, "weight_decay": 0.3, "eps": 1e-8}
    state = made(kind, few)
    large = [
        None if t is None else sparse(tmp_path / name, count, dtype=t.dtype) for name, t in vars(state).items()
    ]  # fmt: skip
    for whole, end in zip(large, vars(state).values(), strict=True):
        if whole is not None:
            whole[-few:] = end
    weight, beside, gradient, mean, square = large
    gradient[-few:] = torch.randn(few)
    expected = step_in_float64(state, gradient[-few:], 0.5, 1, **settings)
    monkeypatch.setattr(op, "_adamw_kernel", LastBlock(op._adamw_kernel, monkeypatch))
    op.adamw_step(weight, beside, gradient, mean, square, torch.tensor(0.5), 1, **settings)
    state = type(state)(*(None if t is None else t[-few:] for t in large))
    assert_stepped(state, expected)
    assert math.isfinite(float(state.mean.abs().max())) and state.mean.all()


def test_a_launch_is_on_the_device_of_the_weight(monkeypatch):
    devices, state = [], made("fp32", 3)
    real = torch.cuda.device_of
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: devices.append(tensor) or real(tensor))
    op.adamw_step(
        state.weight, None, torch.ones(3), state.mean, state.square, torch.tensor(1.0), 1,
        lr=0.1, beta1=0.9, beta2=0.95, weight_decay=0.0, eps=1e-8,
    )  # fmt: skip
    assert len(devices) == 1 and devices[0] is state.weight

"""What a step of AdamW is made on, and the step itself in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Dtypes of the weight, of what the master has beside it, and of the gradient.
KINDS = {
    "bf16": (torch.bfloat16, torch.int16, torch.bfloat16),
    "bf16, gradient fp32": (torch.bfloat16, torch.int16, torch.float32),
    "fp16": (torch.float16, torch.float32, torch.float16),
    "fp32": (torch.float32, None, torch.float32),
    "fp32, gradient fp16": (torch.float32, None, torch.float16),
}
ULP = 2.0**-23


@dataclass
class State:
    weight: Tensor
    beside: Tensor | None
    gradient: Tensor  # zeros of its dtype
    mean: Tensor
    square: Tensor


@dataclass
class Exact:
    """After a step in float64; and how far float32 may be from it, were every rounding of it the worst one."""

    value: Tensor
    mean: Tensor
    square: Tensor
    value_bound: Tensor
    mean_bound: Tensor
    square_bound: Tensor


def made(kind: str, count: int, values: Tensor | None = None, device: torch.device | str = "cpu") -> State:
    """A weight of these values, random ones where none are given; its moments are zero."""
    weight_dtype, beside_dtype, gradient_dtype = KINDS[kind]
    values = torch.randn(count, device=device) if values is None else values
    weight, beside = values.to(weight_dtype), None
    if beside_dtype == torch.int16:
        bits = values.view(torch.int32)
        beside = bits.to(torch.int16)
        weight = ((bits + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16)
    elif beside_dtype is not None:
        beside = values.clone()
    zeros = torch.zeros(count, device=device)
    return State(weight, beside, zeros.to(gradient_dtype), zeros.clone(), zeros.clone())


def value_of(state: State) -> Tensor:
    """The master, float32."""
    if state.beside is None:
        return state.weight
    if state.beside.dtype == torch.float32:
        return state.beside
    return ((state.weight.view(torch.int16).int() << 16) + state.beside).view(torch.float32)


def step_in_float64(
    state: State, gradient: Tensor, shrink: float, step: int, *, lr, beta1, beta2, weight_decay, eps
) -> Exact:
    """From the state as it is, which stays."""
    value, mean, square = value_of(state).double(), state.mean.double(), state.square.double()
    gradient = gradient.double() * shrink
    mean_terms = (beta1 * mean).abs() + ((1 - beta1) * gradient).abs()
    mean = beta1 * mean + (1 - beta1) * gradient
    square = beta2 * square + (1 - beta2) * gradient.square()
    root = (square / (1 - beta2**step)).sqrt() + eps
    rate = lr / (1 - beta1**step)
    bounds = value.abs() + 8 * rate * mean_terms / root, 2 * mean_terms, 3 * square
    value = value * (1 - lr * weight_decay) - rate * mean / root
    return Exact(value, mean, square, *(ULP * bound for bound in bounds))


def assert_stepped(state: State, expected: Exact) -> None:
    """As near as float32 is; and the weight is its master, rounded."""
    value = value_of(state)
    assert ((value.double() - expected.value).abs() <= expected.value_bound).all()
    assert ((state.mean.double() - expected.mean).abs() <= expected.mean_bound).all()
    assert ((state.square.double() - expected.square).abs() <= expected.square_bound + 1e-37).all()
    ties = value.view(torch.int32) % (1 << 16) == 0x8000
    assert torch.equal(state.weight[~ties], value.to(state.weight.dtype)[~ties])

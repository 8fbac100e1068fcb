"""Random layers on every backend against the float64 reference: sizes, routings, pools, gradients, layouts."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from esft_kernels.autograd_op import RECOMPUTE, expert_mlp
from esft_kernels.backend import Needs
from esft_kernels.formats.resolve import FORMATS
from esft_kernels.pools import PLAIN
from tests.esft_kernels.layers import (
    ACTIVATIONS,
    TOLERANCE,
    Layer,
    assert_close,
    make_layer,
    poison_empty,
    written_out,
)
from tests.esft_kernels.test_autograd_op import exact

PADDING = 7  # rows beyond T that are never read
RESULTS = ("output", *(f"gradient of {name}" for name in ("x", "weights", "gate_up", "down", "up bias", "down bias")))


@st.composite
def layers(draw, formats: tuple[str, ...] = (PLAIN,)) -> Layer:
    experts = draw(st.integers(1, 9))
    top_k = draw(st.integers(1, min(experts, 5)))
    tokens = draw(st.integers(0, 24))
    ids = list(range(experts))
    routing = draw(st.sampled_from(["uniform", "few experts", "as few as can be"]))
    if routing == "uniform":
        used = ids
    else:
        fewest = top_k if routing == "as few as can be" else draw(st.integers(top_k, experts))
        used = draw(st.permutations(ids))[:fewest]
    trained = draw(st.permutations(ids))[: draw(st.integers(0, experts))]
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    return make_layer(
        tokens, top_k, experts, draw(st.integers(1, 70)), draw(st.integers(1, 70)), tuple(trained), tuple(used), dtype,
        draw(st.sampled_from(sorted(ACTIVATIONS.values(), key=str))),
        draw(st.booleans()), draw(st.booleans()), draw(st.booleans()), draw(st.sampled_from([False, False, True])),
        draw(st.sampled_from(formats)),
    )  # fmt: skip


def padded(tensor: torch.Tensor) -> torch.Tensor:
    """The same values at the front of a buffer whose other rows are NaN, off by an element from any alignment."""
    buffer = tensor.new_full(((tensor.shape[0] + PADDING) * tensor.shape[1] + 1,), float("nan"))
    view = buffer[1 : 1 + tensor.numel()].view(tensor.shape)
    return view.copy_(tensor)


def step(layer: Layer, backend: str, needs: Needs, recompute: str) -> list[torch.Tensor | None]:
    pools = layer.pools
    x, weights = padded(layer.x_TD).requires_grad_(needs.x), padded(layer.weights_TK).requires_grad_(needs.weights)
    trained = [None if t is None else t.requires_grad_(needs.trained) for t in pools.trained.tensors()]
    out = expert_mlp(x, weights, pools, layer.routing, backend, recompute)
    if out.requires_grad:
        out.backward(padded(layer.grad_out_TD))
    return [out.detach(), x.grad, weights.grad, *(None if t is None else t.grad for t in trained)]


def sensitivity(layer: Layer, needs: Needs, expected: list[torch.Tensor | None]) -> list[float]:
    """How far each result moves when every weight and input moves by one rounding of the layer's dtype.

    In a small layer terms may cancel, and then a few roundings are much of what is left: a bound by the largest element
    would not do.
    """
    eps, moved = torch.finfo(layer.x_TD.dtype).eps, [0.0] * len(expected)
    for _ in range(4):
        values = vars(layer.to(torch.float64))
        for name in ("x_TD", "grad_out_TD", "gate_up_EGD", "down_EDF"):
            values[name] = values[name] * (1 + eps * (2 * torch.randint_like(values[name], 2) - 1))
        for n, (value, other) in enumerate(zip(expected, exact(Layer(**values), needs), strict=True)):
            if value is not None and other is not None and value.numel():
                moved[n] = max(moved[n], (value - other).abs().max().item())
    return moved


def agrees(layer: Layer, backend: str, needs: Needs, recompute: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        poison_empty(patch)
        second = step(layer, backend, needs, recompute)
        if backend == "triton" and layer.x_TD.device.type == "cpu":
            from tests.esft_kernels.bounds import check_bounds

            check_bounds(patch)
        first = step(layer, backend, needs, recompute)
    plain = written_out(layer)
    results = exact(plain, needs)
    moves = sensitivity(plain, needs, results)
    for what, actual, again, expected, moved in zip(RESULTS, first, second, results, moves, strict=True):
        largest = 0.0 if expected is None or not expected.numel() else expected.abs().max().item()
        assert_close(actual, expected, TOLERANCE[layer.x_TD.dtype] + (5 * moved / largest if largest else 0), what)
        assert actual is None or (again is not None and torch.equal(actual, again)), f"{what} is not the same twice"


fuzzed = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
NEEDS, RECOMPUTES = st.tuples(st.booleans(), st.booleans(), st.booleans()), st.sampled_from(RECOMPUTE)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["reference", "cpu", "cpu_packed", "triton"])
@fuzzed
@given(layer=layers(), needs=NEEDS, recompute=RECOMPUTES)
def test_every_backend_agrees_with_the_reference_and_with_itself(backend, layer, needs, recompute):
    if backend == "triton":
        pytest.importorskip("triton")
    agrees(layer, backend, Needs(*needs), recompute)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
@fuzzed
@given(layer=layers(tuple(FORMATS)), needs=NEEDS, recompute=RECOMPUTES, few_rows=st.sampled_from([-1, 128]))
def test_so_do_quantized_layers(backend, layer, needs, recompute, few_rows):
    with pytest.MonkeyPatch.context() as patch:
        if backend == "triton":
            pytest.importorskip("triton")
            from esft_kernels.backends import triton_parts as parts

            patch.setattr(parts, "FEW_ROWS", few_rows)
            patch.setattr(parts, "SCRATCH", 20_000)  # bytes: an expert or many
        agrees(layer, backend, Needs(*needs), recompute)

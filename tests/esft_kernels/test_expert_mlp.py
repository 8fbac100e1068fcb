"""The differentiable op on every backend against the float64 reference: output and every gradient."""

from dataclasses import replace

import pytest
import torch

from esft_kernels import reference
from esft_kernels.cpu import rounded
from esft_kernels.expert_mlp import expert_mlp, resolve_backend
from esft_kernels.pools import ExpertPools, Needs
from tests.esft_kernels.layers import TOLERANCE, Layer, assert_close, make_layer, poison_empty

EVERYTHING = Needs(x=True, weights=True, trained=True)
CASES = {
    "mixed": {},
    "sizes that no tile divides": {"hidden": 67, "intermediate": 33},
    "no rows on trained 1 and frozen 0": {"used": (2, 3, 4, 5)},
    "no row on a trained expert": {"used": (0, 2, 3, 5)},
    "all rows on a trained expert": {"top_k": 1, "used": (4,), "tokens": 40},
    "all rows on a frozen expert": {"top_k": 1, "used": (2,), "tokens": 40},
    "none trained": {"trained": ()},
    "all trained": {"trained": (5, 0, 3, 1, 2, 4)},
    "no token": {"tokens": 0},
    "one token": {"tokens": 1},
}
NEEDS = {
    "x": Needs(x=True, weights=False, trained=False),
    "weights": Needs(x=False, weights=True, trained=False),
    "trained": Needs(x=False, weights=False, trained=True),
    "weights and trained": Needs(x=False, weights=True, trained=True),
}


@pytest.fixture(params=["reference", "cpu", "triton"])
def backend(request) -> str:
    if request.param == "triton":
        pytest.importorskip("triton")
    return request.param


def run(layer: Layer, backend: str, needs: Needs) -> list[torch.Tensor | None]:
    """Output, and the gradients of x, routing weights, trained gate_up and trained down; None where not needed."""
    pools = layer.pools
    x, weights = layer.x_TD.clone().requires_grad_(needs.x), layer.weights_TK.clone().requires_grad_(needs.weights)
    gate_up = pools.trained_gate_up_SGD.requires_grad_(needs.trained)
    down = pools.trained_down_SDF.requires_grad_(needs.trained)
    out = expert_mlp(x, weights, pools, layer.routing, backend)
    out.backward(layer.grad_out_TD)
    return [out.detach(), x.grad, weights.grad, gate_up.grad, down.grad]


def exact(layer: Layer, needs: Needs) -> list[torch.Tensor | None]:
    layer = layer.to(torch.float64)
    out, h = reference.forward(layer.x_TD, layer.weights_TK, layer.pools, layer.routing)
    grads = reference.backward(layer.grad_out_TD, layer.x_TD, h, layer.weights_TK, layer.pools, layer.routing, needs)
    return [out, *vars(grads).values()]


def check(layer: Layer, backend: str, needs: Needs) -> None:
    for actual, expected in zip(run(layer, backend, needs), exact(layer, needs), strict=True):
        assert_close(actual, expected, TOLERANCE[layer.x_TD.dtype])


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_fp32(case, backend, monkeypatch):
    layer = make_layer(**case, dtype=torch.float32)
    poison_empty(monkeypatch)
    check(layer, backend, EVERYTHING)


@pytest.mark.parametrize("needs", NEEDS.values(), ids=NEEDS)
def test_only_what_is_needed(needs, backend, monkeypatch):
    layer = make_layer(dtype=torch.float32)
    poison_empty(monkeypatch)
    check(layer, backend, needs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit(dtype, backend, monkeypatch):
    layer = make_layer(dtype=dtype)
    poison_empty(monkeypatch)
    check(layer, backend, EVERYTHING)


def test_two_runs_give_the_same_bits(backend):
    layer = make_layer(dtype=torch.float32)
    for first, second in zip(run(layer, backend, EVERYTHING), run(layer, backend, EVERYTHING), strict=True):
        assert first is not None and second is not None and torch.equal(first, second)


def test_prefix_only_reads_nothing_of_the_frozen_pool_in_backward(backend):
    layer = make_layer(dtype=torch.float32)
    pools, routing = layer.pools, layer.routing
    module = resolve_backend(backend, torch.device("cpu"))
    _, h = module.forward(layer.x_TD, layer.weights_TK, pools, routing)
    frozen = {name: torch.full_like(getattr(pools, name), float("nan"))
              for name in ("frozen_gate_up_RGD", "frozen_down_RDF")}  # fmt: skip
    needs, prefix = NEEDS["trained"], routing.prefix_rows()
    args = layer.weights_TK, replace(pools, **frozen), routing, needs
    grads = module.backward(layer.grad_out_TD, layer.x_TD, h[:prefix].clone(), *args)
    assert grads.x_TD is None and grads.weights_TK is None
    _, _, _, gate_up, down = exact(layer, needs)
    assert_close(grads.trained_gate_up_SGD, gate_up, TOLERANCE[torch.float32])
    assert_close(grads.trained_down_SDF, down, TOLERANCE[torch.float32])


@pytest.mark.parametrize(("needs", "all_rows"), [(EVERYTHING, True), (NEEDS["trained"], False)])
def test_saves_x_h_and_routing_and_nothing_else(needs, all_rows):
    layer = make_layer(dtype=torch.float32)
    pools, routing = layer.pools, layer.routing
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        trained = [t.requires_grad_() for t in (pools.trained_gate_up_SGD, pools.trained_down_SDF)]
        x, weights = layer.x_TD.requires_grad_(needs.x), layer.weights_TK.requires_grad_(needs.weights)
        expert_mlp(x, weights, pools, routing, "reference")
    inputs = [x, weights, *trained, pools.frozen_gate_up_RGD, pools.frozen_down_RDF, *vars(routing).values()]
    known = {t.data_ptr() for t in inputs if isinstance(t, torch.Tensor)}
    (h,) = [t for t in saved if t.data_ptr() not in known]
    assert h.shape == (routing.num_rows if all_rows else routing.prefix_rows(), 2 * pools.intermediate_size)
    assert h.untyped_storage().nbytes() == h.numel() * 4


def swap_pool(layer: Layer, **tensors: torch.Tensor) -> tuple:
    return layer.x_TD, layer.weights_TK, replace(layer.pools, **tensors), layer.routing


def test_bad_input_is_named():
    layer = make_layer(dtype=torch.float32)
    x, weights, pools, routing = layer.x_TD, layer.weights_TK, layer.pools, layer.routing
    frozen = pools.frozen_down_RDF
    bad = {
        "x must have shape": (x[1:], weights, pools, routing),
        "trained_gate_up must be torch.float64": (x.double(), weights, pools, routing),
        "routing weights must have shape": (x, weights[:, 1:], pools, routing),
        "trained_down must have shape": swap_pool(layer, trained_down_SDF=pools.trained_down_SDF[:, 1:]),
        "frozen pool cannot require": swap_pool(layer, frozen_down_RDF=frozen.clone().requires_grad_()),
        "same strides": swap_pool(layer, frozen_down_RDF=frozen.mT.contiguous().mT),
        "routing is for": (x, weights, pools, make_layer(trained=(4, 1, 0)).routing),
    }
    for message, args in bad.items():
        with pytest.raises(ValueError, match=message):
            expert_mlp(*args)
    with pytest.raises(ValueError, match="backend must be one of"):
        expert_mlp(x, weights, pools, routing, "cuda")


def test_triton_refuses_cpu_tensors_without_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        resolve_backend("triton", torch.device("cpu"))


def test_pools_look_up_experts_by_position():
    layer = make_layer()
    pools: ExpertPools = layer.pools
    assert torch.equal(pools.gate_up(0), layer.gate_up_EGD[4]) and torch.equal(pools.down(1), layer.down_EDF[1])
    assert torch.equal(pools.gate_up(2), layer.gate_up_EGD[0]) and torch.equal(pools.down(5), layer.down_EDF[5])


def test_rounded_row_counts_are_few_and_little_too_many():
    sizes = {rounded(n) for n in range(1, 4097)}
    assert len(sizes) <= 8 * 12 + 1
    assert all(n <= rounded(n) <= n * 9 / 8 for n in range(1, 4097))
    assert [rounded(n) for n in (1, 15, 17, 512, 513)] == [1, 15, 18, 512, 576]

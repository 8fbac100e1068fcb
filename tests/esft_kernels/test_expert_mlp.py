"""The differentiable op on every backend against the float64 reference: output and every gradient."""

from dataclasses import replace

import pytest
import torch
from esft_kernels.cpu import rounded

from esft_kernels import reference
from esft_kernels.expert_mlp import RECOMPUTE, expert_mlp, resolve_backend
from esft_kernels.pools import ExpertPools, ExpertWeights, Needs
from esft_kernels.routing import Routing
from tests.esft_kernels.layers import ACTIVATIONS, GPT_OSS, TOLERANCE, Layer, assert_close, make_layer, poison_empty

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
    "many experts, sixteen of them a token": {
        "experts": 130,
        "top_k": 16,
        "tokens": 3,
        "trained": (129, 7, 64),
        "hidden": 16,
        "intermediate": 8,
    },
    "biases": {"biased": True},
    "transposed": {"transposed": True},
    "as in gpt-oss": {"interleaved": True, "transposed": True, "biased": True, "activation": GPT_OSS},
    "without a gate": {"activation": ACTIVATIONS["relu2"]},
}
NEEDS = {
    "x": Needs(x=True, weights=False, trained=False),
    "weights": Needs(x=False, weights=True, trained=False),
    "trained": Needs(x=False, weights=False, trained=True),
    "weights and trained": Needs(x=False, weights=True, trained=True),
}


@pytest.fixture(params=["reference", "cpu", "cpu_packed", "triton"])
def backend(request) -> str:
    if request.param == "triton":
        pytest.importorskip("triton")
    return request.param


def run(layer: Layer, backend: str, needs: Needs, recompute: str = "none") -> list[torch.Tensor | None]:
    """Output, and the gradients of x, routing weights and the trained pool's tensors; None where not needed."""
    pools = layer.pools
    x, weights = layer.x_TD.clone().requires_grad_(needs.x), layer.weights_TK.clone().requires_grad_(needs.weights)
    trained = [None if t is None else t.requires_grad_(needs.trained) for t in pools.trained.tensors()]
    out = expert_mlp(x, weights, pools, layer.routing, backend, recompute)
    out.backward(layer.grad_out_TD)
    return [out.detach(), x.grad, weights.grad, *(None if t is None else t.grad for t in trained)]


def exact(layer: Layer, needs: Needs) -> list[torch.Tensor | None]:
    layer = layer.to(torch.float64)
    pools, routing = layer.pools, layer.routing
    out, h = reference.forward(layer.x_TD, layer.weights_TK, pools, routing, routing.num_rows)
    grads = reference.backward(layer.grad_out_TD, layer.x_TD, h, layer.weights_TK, pools, routing, needs)
    trained = (None,) * 4 if grads.trained is None else grads.trained.tensors()
    return [out, grads.x_TD, grads.weights_TK, *trained]


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


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_two_runs_give_the_same_bits(backend, recompute):
    layer = make_layer(dtype=torch.float32)
    once = run(layer, backend, EVERYTHING)
    for first, second in zip(once, run(layer, backend, EVERYTHING, recompute), strict=True):
        assert (first is None) == (second is None)
        assert first is None or (second is not None and torch.equal(first, second))


@pytest.mark.parametrize("case", [{}, {"trained": ()}, {"trained": tuple(range(6))}, {"biased": True}], ids=str)
def test_recomputed_rows_are_right(case, backend, monkeypatch):
    layer = make_layer(**case, dtype=torch.float32)
    poison_empty(monkeypatch)
    for actual, expected in zip(run(layer, backend, EVERYTHING, "frozen"), exact(layer, EVERYTHING), strict=True):
        assert_close(actual, expected, TOLERANCE[torch.float32])


def test_gradients_are_laid_out_like_the_weights(backend):
    layer = make_layer(dtype=torch.float32, transposed=True)
    _, _, _, gate_up, down, *_ = run(layer, backend, EVERYTHING)
    pools = layer.pools
    assert gate_up is not None and gate_up.stride() == pools.trained.gate_up_EGD.stride()
    assert down is not None and down.stride() == pools.trained.down_EDF.stride()


def test_prefix_only_reads_nothing_of_the_frozen_pool_in_backward(backend):
    layer = make_layer(dtype=torch.float32)
    pools, routing = layer.pools, layer.routing
    module = resolve_backend(backend, torch.device("cpu"))
    needs, prefix = NEEDS["trained"], routing.prefix_rows()
    _, h = module.forward(layer.x_TD, layer.weights_TK, pools, routing, prefix)
    frozen = ExpertWeights(*(None if t is None else torch.full_like(t, float("nan")) for t in pools.frozen.tensors()))
    args = layer.weights_TK, replace(pools, frozen=frozen), routing, needs
    grads = module.backward(layer.grad_out_TD, layer.x_TD, h, *args)
    assert grads.x_TD is None and grads.weights_TK is None
    _, _, _, gate_up, down, *_ = exact(layer, needs)
    assert_close(grads.trained.gate_up_EGD, gate_up, TOLERANCE[torch.float32])
    assert_close(grads.trained.down_EDF, down, TOLERANCE[torch.float32])


def saved_bytes(layer: Layer, backend: str, needs: Needs, recompute: str) -> int:
    """Bytes kept for the backward beside the weights, which live anyway: x, H, routing weights and routing."""
    pools, routing = layer.pools, layer.routing
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    x, weights = layer.x_TD.requires_grad_(needs.x), layer.weights_TK.requires_grad_(needs.weights)
    trained = [t.requires_grad_(needs.trained) for t in pools.trained.tensors() if t is not None]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        expert_mlp(x, weights, pools, routing, backend, recompute)
    alive = [*trained, *(t for t in pools.frozen.tensors() if t is not None)]
    known = {t.untyped_storage().data_ptr() for t in alive}
    return sum(size for pointer, size in saved.items() if pointer not in known)


@pytest.mark.parametrize(
    ("needs", "recompute", "prefix_only"),
    [(EVERYTHING, "none", False), (EVERYTHING, "frozen", True), (NEEDS["trained"], "none", True)],
    ids=["all rows", "frozen rows rebuilt", "prefix only"],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_saves_x_and_h_and_the_routing_and_nothing_else(dtype, needs, recompute, prefix_only, backend):
    layer = make_layer(tokens=64, dtype=dtype)
    t, d, f = 64, layer.pools.hidden_size, layer.pools.intermediate_size
    routing = layer.routing
    rows = routing.prefix_rows() if prefix_only else routing.num_rows
    size = dtype.itemsize
    tables = [*(v for v in vars(routing).values() if isinstance(v, torch.Tensor)), layer.weights_TK]
    routing_bytes = sum(table.untyped_storage().nbytes() for table in tables)
    # The floor: 2DT + 4FN bytes in bf16.
    assert saved_bytes(layer, backend, needs, recompute) == size * d * t + size * 2 * f * rows + routing_bytes


def swap_pool(layer: Layer, **tensors: torch.Tensor) -> tuple:
    pools = layer.pools
    for name, tensor in tensors.items():
        pool, field = name.split("_", 1)
        pools = replace(pools, **{pool: replace(getattr(pools, pool), **{field: tensor})})
    return layer.x_TD, layer.weights_TK, pools, layer.routing


def test_bad_input_is_named():
    layer = make_layer(dtype=torch.float32)
    x, weights, pools, routing = layer.x_TD, layer.weights_TK, layer.pools, layer.routing
    frozen = pools.frozen.down_EDF
    bad = {
        "x must have shape": (x[1:], weights, pools, routing),
        "trained_gate_up must be torch.float64": (x.double(), weights, pools, routing),
        "routing weights must have shape": (x, weights[:, 1:], pools, routing),
        "trained_down must have shape": swap_pool(layer, trained_down_EDF=pools.trained.down_EDF[:, 1:]),
        "frozen pool cannot require": swap_pool(layer, frozen_down_EDF=frozen.clone().requires_grad_()),
        "same strides": swap_pool(layer, frozen_down_EDF=frozen.mT.contiguous().mT),
        "biases must be given for both": swap_pool(layer, trained_down_bias_ED=torch.zeros(2, 72)),
        "routing weights must be floats": (x, weights.int(), pools, routing),
        "trained_gate_up must be a stack of matrices": swap_pool(
            layer, trained_gate_up_EGD=pools.trained.gate_up_EGD[0]
        ),
        "trained_down must be a stack of matrices": swap_pool(layer, trained_down_EDF=None),
        "x must be of a float dtype": (x.long(), weights, pools, routing),
        "routing is for": (x, weights, pools, make_layer(trained=(4, 1, 0)).routing),
    }
    for message, args in bad.items():
        with pytest.raises(ValueError, match=message):
            expert_mlp(*args)
    with pytest.raises(ValueError, match="recompute must be one of none, frozen, got 'all'"):
        expert_mlp(x, weights, pools, routing, recompute="all")
    with pytest.raises(ValueError, match="backend must be one of"):
        expert_mlp(x, weights, pools, routing, "cuda")


def test_triton_refuses_cpu_tensors_without_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        resolve_backend("triton", torch.device("cpu"))


def test_an_expert_beyond_32_bit_offsets_is_refused():
    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, device="meta")

    spread = torch.empty_strided((4, 80, 72), (72, 2**25, 1), device="meta")  # experts lie inside one another's rows
    pools = ExpertPools(ExpertWeights(empty(0, 80, 72), empty(0, 72, 40)), ExpertWeights(spread, empty(4, 72, 40)))
    index = torch.empty(6, dtype=torch.int64, device="meta")
    routing = Routing(index, index, index.view(3, 2), torch.empty(5, dtype=torch.int64, device="meta"), 0)
    with pytest.raises(ValueError, match=r"frozen_gate_up must hold an expert within 2\*\*31 elements"):
        expert_mlp(empty(3, 72), empty(3, 2), pools, routing)


def test_inputs_at_odd_addresses_are_copied(monkeypatch):
    layer = make_layer(dtype=torch.bfloat16)
    moved = torch.empty(layer.x_TD.numel() + 1, dtype=torch.bfloat16)[1:].view_as(layer.x_TD).copy_(layer.x_TD)
    assert moved.data_ptr() % 16
    seen = []
    module = resolve_backend("reference", torch.device("cpu"))
    real = module.forward
    monkeypatch.setattr(module, "forward", lambda x, *args: seen.append(x.data_ptr()) or real(x, *args))
    out = expert_mlp(moved, layer.weights_TK, layer.pools, layer.routing, "reference")
    assert torch.equal(out, expert_mlp(layer.x_TD, layer.weights_TK, layer.pools, layer.routing, "reference"))
    assert not any(pointer % 16 for pointer in seen)


def test_pools_look_up_experts_by_position():
    layer = make_layer(biased=True)
    first, last = layer.pools.at(0), layer.pools.at(5)
    assert torch.equal(first.gate_up_EGD, layer.gate_up_EGD[4]) and torch.equal(last.down_EDF, layer.down_EDF[5])
    assert layer.down_bias_ED is not None and last.down_bias_ED is not None
    assert torch.equal(last.down_bias_ED, layer.down_bias_ED[5])


def test_rounded_row_counts_are_few_and_little_too_many():
    sizes = {rounded(n) for n in range(1, 4097)}
    assert len(sizes) <= 16 * 12 + 1
    assert all(n <= rounded(n) <= n * 17 / 16 for n in range(1, 4097))
    assert [rounded(n) for n in (1, 31, 33, 512, 513)] == [1, 31, 34, 512, 544]

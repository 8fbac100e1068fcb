"""The differentiable op on every backend against the float64 reference: output and every gradient."""

from dataclasses import replace

import pytest
import torch

from esft_kernels.autograd_op import RECOMPUTE, expert_mlp
from esft_kernels.backend import Needs
from esft_kernels.backends.cpu import rounded
from esft_kernels.backends.resolve import resolve_backend
from esft_kernels.formats.resolve import FORMATS
from esft_kernels.pools import ExpertWeights, QuantizedWeights, dequantize
from tests.esft_kernels.layers import (
    ACTIVATIONS,
    GPT_OSS,
    TOLERANCE,
    Layer,
    assert_close,
    make_layer,
    poison_empty,
    written_out,
)
from tests.esft_kernels.test_autograd_op import EVERYTHING, NEEDS, exact, run

pytestmark = pytest.mark.slow

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


@pytest.fixture(params=["reference", "cpu", "cpu_packed", "triton"])
def backend(request) -> str:
    if request.param == "triton":
        pytest.importorskip("triton")
    return request.param


def check(layer: Layer, backend: str, needs: Needs) -> None:
    for actual, expected in zip(run(layer, backend, needs), exact(written_out(layer), needs), strict=True):
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


FEW = {"tokens": 8, "top_k": 2, "experts": 4, "trained": (3, 1)}  # in the interpreter every tile takes its time
QUANTIZED = {
    "mixed": {},
    "sizes that no block divides": {"hidden": 67, "intermediate": 33},
    "sizes of more than a block": {
        "hidden": 136, "intermediate": 136, "tokens": 3, "top_k": 1, "experts": 3, "trained": (2,),
    },
    "experts without rows": FEW | {"used": (0, 1)},
    "all rows on a frozen expert": FEW | {"top_k": 1, "used": (2,), "tokens": 20},
    "none trained": FEW | {"trained": ()},
    "all trained": FEW | {"trained": (3, 0, 1, 2)},
    "no token": FEW | {"tokens": 0},
    "biases": FEW | {"biased": True},
    "transposed": FEW | {"transposed": True},
    "as in gpt-oss": FEW | {"interleaved": True, "transposed": True, "biased": True, "activation": GPT_OSS},
    "without a gate": FEW | {"activation": ACTIVATIONS["relu2"]},
    "rows of no expert": FEW | {"elsewhere": True},
}  # fmt: skip


@pytest.fixture(params=["reference", "cpu", "triton", "triton, decoded first"])
def quantized_backend(request, monkeypatch) -> str:
    name, *first = request.param.split(",")
    if name == "triton":
        pytest.importorskip("triton")
        from esft_kernels.backends import triton_parts as parts

        monkeypatch.setattr(parts, "FEW_ROWS", -1 if first else 1000)
        monkeypatch.setattr(parts, "SCRATCH", 4 * 2 * 72 * 80)  # two experts of the usual layer
    return name


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("case", QUANTIZED.values(), ids=QUANTIZED)
def test_quantized(case, format, quantized_backend, monkeypatch):
    layer = make_layer(**case, format=format, dtype=torch.float32)
    poison_empty(monkeypatch)
    check(layer, quantized_backend, EVERYTHING)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_quantized_16_bit(format, dtype, quantized_backend, monkeypatch):
    layer = make_layer(**FEW, dtype=dtype, format=format)
    poison_empty(monkeypatch)
    check(layer, quantized_backend, EVERYTHING)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_two_runs_of_a_quantized_layer_give_the_same_bits(format, recompute, quantized_backend):
    layer = make_layer(**FEW, dtype=torch.float32, format=format)
    once = run(layer, quantized_backend, EVERYTHING)
    for first, second in zip(once, run(layer, quantized_backend, EVERYTHING, recompute), strict=True):
        assert first is second is None or torch.equal(first, second)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("quantized_backend", ["reference", "cpu"], indirect=True)
def test_quantized_is_what_plain_weights_of_the_same_values_give(format, dtype, quantized_backend):
    """To the bit, with the recomputation too: only where the weights come from differs."""
    layer = make_layer(dtype=dtype, hidden=130, format=format)
    pools = layer.pools
    assert isinstance(pools.frozen, QuantizedWeights)
    plain = replace(pools, frozen=dequantize(pools.frozen, dtype))
    for recompute in RECOMPUTE:
        both = [run(layer, quantized_backend, EVERYTHING, recompute, pools) for pools in (layer.pools, plain)]
        for actual, expected in zip(*both, strict=True):
            assert actual is expected is None or torch.equal(actual, expected)


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


def test_rounded_row_counts_are_few_and_little_too_many():
    sizes = {rounded(n) for n in range(1, 4097)}
    assert len(sizes) <= 16 * 12 + 1
    assert all(n <= rounded(n) <= n * 17 / 16 for n in range(1, 4097))
    assert [rounded(n) for n in (1, 31, 33, 512, 513)] == [1, 31, 34, 512, 544]

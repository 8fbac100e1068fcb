"""The three functions of the backend against their twins of the reference, in float64."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from esft_kernels.backend import Needs
from esft_kernels.backends import reference
from esft_kernels.formats.resolve import FORMATS

pytest.importorskip("triton")
from esft_kernels.backends import triton_backend
from esft_kernels.backends import triton_parts as parts
from esft_kernels.triton_ops import tiles
from esft_kernels.triton_ops import up_gemm as up
from tests.esft_kernels.bounds import check_bounds, poison_masked, sum_in_one_order
from tests.esft_kernels.layers import (
    ACTIVATIONS,
    GPT_OSS,
    TOLERANCE,
    Layer,
    assert_close,
    h_columns,
    make_layer,
    poison_empty,
)

NEEDS = [Needs(*map(bool, bits)) for bits in ((1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1), (1, 0, 1))]
CASES = {
    "plain": {},
    "biases": {"biased": True},
    "interleaved, transposed and biased": {
        "interleaved": True, "transposed": True, "biased": True, "activation": GPT_OSS,
    },
    "without a gate": {"activation": ACTIVATIONS["relu2"], "biased": True},
    "none trained": {"trained": (), "biased": True},
    "all trained": {"trained": (2, 0, 3, 1)},
    "elsewhere": {"elsewhere": True, "biased": True},
    "no row on a trained expert": {"used": (0, 1, 3), "biased": True},
    "no token": {"tokens": 0, "biased": True},
}  # fmt: skip


@pytest.fixture(autouse=True)
def _strict(monkeypatch):
    poison_empty(monkeypatch)
    poison_masked(monkeypatch)
    check_bounds(monkeypatch)


def small(dtype: torch.dtype = torch.float32, **settings) -> Layer:
    sizes = {"tokens": 9, "top_k": 2, "experts": 4, "hidden": 20, "intermediate": 10, "trained": (2, 1)}
    return make_layer(**sizes | settings, dtype=dtype)


def exact_h(layer: Layer) -> torch.Tensor:
    layer = layer.to(torch.float64)
    return reference.forward(layer.x_TD, layer.weights_TK, layer.pools, layer.routing, layer.routing.num_rows)[1]


# Sizes that descriptors can load: rows of whole 16 bytes. Blocks are 16 rows, 32 columns and 64 input features.
DESCRIBED = {
    "plain": {}, "transposed": {"transposed": True, "interleaved": True, "biased": True},
    "without a gate": {"activation": ACTIVATIONS["relu2"], "trained": ()},
    "gates before ups in columns": {"transposed": True},  # those cannot be loaded so
    "whole blocks": {"hidden": 64, "intermediate": 32, "dtype": torch.bfloat16, "elsewhere": True},
}  # fmt: skip


@pytest.mark.parametrize("case", DESCRIBED.values(), ids=DESCRIBED)
def test_every_variant_of_the_tiles_gives_the_same_bits(case, monkeypatch):
    sum_in_one_order(monkeypatch)
    layer = small(**{"tokens": 30, "hidden": 72, "intermediate": 24} | case)
    pools, routing, h = layer.pools, layer.routing, exact_h(layer)
    h = h[:, h_columns(pools)].to(layer.x_TD.dtype).contiguous()

    def results(**changes) -> list[torch.Tensor]:
        def choose(*asked) -> tiles.Tiles:
            return replace(tiles.choose_tiles(*asked), **changes)

        with tiles.chosen_by(choose):
            out, kept = triton_backend.forward(layer.x_TD, layer.weights_TK, pools, routing, routing.num_rows)
            grads = triton_backend.backward(
                layer.grad_out_TD, layer.x_TD, h, layer.weights_TK, pools, routing, NEEDS[0]
            )
        assert grads.trained is not None
        found = out, kept[: int(routing.offsets_E1[-1])], grads.x_TD, grads.weights_TK, *grads.trained.tensors()
        return [t for t in found if t is not None]

    plain = results()
    for changes in ({"descriptors": True}, {"persistent": 1}, {"descriptors": True, "persistent": 1}):
        for one, other in zip(plain, results(**changes), strict=True):
            assert torch.equal(one, other) and not one.isnan().any()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_forward_and_rebuild(case):
    layer = small(**case)
    pools, routing, exact = layer.pools, layer.routing, layer.to(torch.float64)
    prefix, here = routing.prefix_rows(), int(routing.offsets_E1[-1])
    expected, h = reference.forward(exact.x_TD, exact.weights_TK, exact.pools, routing, routing.num_rows)
    h = h[:, h_columns(pools)]
    for keep in (0, prefix, routing.num_rows):
        out, kept = triton_backend.forward(layer.x_TD, layer.weights_TK, pools, routing, keep)
        assert_close(out, expected, TOLERANCE[torch.float32])
        assert kept.shape == (keep, pools.gate_up_size)
        assert_close(kept[:here], h[: min(keep, here)], TOLERANCE[torch.float32])
        assert kept[here:].isnan().all()  # of no expert
    again = triton_backend.rebuild(layer.x_TD, kept[:prefix].clone(), pools, routing)
    assert torch.equal(again[:here], kept[:here]) and again.shape == kept.shape  # the same bits


def test_choices_of_no_expert_are_refused():
    position = torch.tensor([1, 0, 2])
    assert triton_backend.route(torch.tensor([[0, 2]]), position, 1).num_rows == 2
    with pytest.raises(ValueError, match=r"top_k_index\[0, 1\] is 3, not an expert in 0\.\.2$"):
        triton_backend.route(torch.tensor([[0, 3]]), position, 1)


def test_rebuild_takes_the_prefix_as_it_is():
    layer = small()
    prefix = torch.full((layer.routing.prefix_rows(), 20), 7.0)
    h = triton_backend.rebuild(layer.x_TD, prefix, layer.pools, layer.routing)
    assert torch.equal(h[: len(prefix)], prefix) and not (h[len(prefix) :] == 7).any()


def check_backward(layer: Layer, needs: Needs) -> None:
    pools, routing, exact = layer.pools, layer.routing, layer.to(torch.float64)
    tolerance, h = TOLERANCE[layer.x_TD.dtype], exact_h(layer)
    expected = reference.backward(exact.grad_out_TD, exact.x_TD, h, exact.weights_TK, exact.pools, routing, needs)
    mine = h[:, h_columns(pools)].to(layer.x_TD.dtype).contiguous()
    mine[int(routing.offsets_E1[-1]) :] = float("nan")  # rows of no expert are not read
    if not needs.all_rows:
        mine = mine[: routing.prefix_rows()]
    found = triton_backend.backward(layer.grad_out_TD, layer.x_TD, mine, layer.weights_TK, pools, routing, needs)
    for actual, value, dtype in (
        (found.x_TD, expected.x_TD, layer.x_TD.dtype),
        (found.weights_TK, expected.weights_TK, layer.weights_TK.dtype),
    ):
        assert_close(actual, value, tolerance)
        assert actual is None or actual.dtype == dtype
    assert (found.trained is None) == (expected.trained is None)
    if found.trained is not None and expected.trained is not None:
        for actual, value in zip(found.trained.tensors(), expected.trained.tensors(), strict=True):
            assert_close(actual, value, tolerance)
            assert actual is None or actual.dtype == layer.x_TD.dtype
        strides = [t if t is None else t.stride() for t in pools.trained.tensors()]
        if layer.trained:
            assert [t if t is None else t.stride() for t in found.trained.tensors()] == strides


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_gradient(case):
    check_backward(small(**case), NEEDS[0])


@pytest.mark.parametrize("needs", NEEDS[1:], ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_only_the_gradients_asked_for(biased, needs):
    check_backward(small(biased=biased), needs)


@pytest.mark.parametrize("case", ["none trained", "elsewhere", "no row on a trained expert"])
def test_the_prefix_alone(case):
    check_backward(small(**CASES[case]), NEEDS[3])


@pytest.fixture(params=["decoded in the loads", "decoded first"])
def way(request, monkeypatch):
    monkeypatch.setattr(parts, "FEW_ROWS", -1 if request.param == "decoded first" else 1000)
    monkeypatch.setattr(parts, "SCRATCH", 4 * 400 * 3)  # three experts of one matrix of the small layer, some times


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_quantized(case, format, way):
    test_forward_and_rebuild(case | {"format": format})
    check_backward(small(**case, format=format), NEEDS[0])


@pytest.mark.parametrize("needs", NEEDS[1:], ids=str)
def test_only_the_gradients_asked_for_of_a_quantized_layer(needs, way):
    for trained in ((2, 1), ()):
        check_backward(small(biased=True, format="nf4", trained=trained), needs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit(dtype):
    layer = small(dtype, biased=True)
    out, _ = triton_backend.forward(layer.x_TD, layer.weights_TK, layer.pools, layer.routing, 0)
    exact = layer.to(torch.float64)
    expected, _ = reference.forward(exact.x_TD, exact.weights_TK, exact.pools, layer.routing, 0)
    assert_close(out, expected, TOLERANCE[dtype])
    check_backward(layer, NEEDS[0])


def test_routing_weights_in_16_bit_get_a_gradient_in_16_bit():
    layer = small(torch.bfloat16, biased=True)
    layer = replace(layer, weights_TK=layer.weights_TK.bfloat16())
    h = exact_h(layer)[:, h_columns(layer.pools)].bfloat16().contiguous()
    found = triton_backend.backward(
        layer.grad_out_TD, layer.x_TD, h, layer.weights_TK, layer.pools, layer.routing, NEEDS[2]
    )  # fmt: skip
    assert found.weights_TK is not None and found.weights_TK.dtype == torch.bfloat16


def test_slots_of_no_expert_here_get_no_gradient():
    layer = small(elsewhere=True, biased=True)
    h = exact_h(layer)[:, h_columns(layer.pools)].float().contiguous()
    found = triton_backend.backward(
        layer.grad_out_TD, layer.x_TD, h, layer.weights_TK, layer.pools, layer.routing, NEEDS[0]
    )  # fmt: skip
    assert found.weights_TK is not None
    assert torch.equal(found.weights_TK == 0, layer.ids_TK == 4)


def test_gradients_of_the_prefix_decode_no_frozen_weights(monkeypatch):
    layer = small(biased=True, format="nf4")
    h = exact_h(layer)[:, h_columns(layer.pools)].float().contiguous()
    monkeypatch.setattr(parts, "FEW_ROWS", -1)
    monkeypatch.setattr(parts, "decode", lambda *_: pytest.fail("decoded"))
    triton_backend.backward(
        layer.grad_out_TD, layer.x_TD, h, layer.weights_TK, layer.pools, layer.routing, NEEDS[3]
    )  # fmt: skip


def test_whatever_is_computed_together_tiles_are_chosen_for_the_whole_layer(monkeypatch):
    """So rows that are made again come out with the same bits."""
    layer, asked, real = small(format="nf4"), [], up.tiles_for
    monkeypatch.setattr(parts, "FEW_ROWS", -1)
    monkeypatch.setattr(parts, "SCRATCH", 0)  # one expert at a time
    monkeypatch.setattr(up, "tiles_for", lambda x, op, rows, *more: asked.append(rows) or real(x, op, rows, *more))
    triton_backend.forward(layer.x_TD, layer.weights_TK, layer.pools, layer.routing, 0)
    prefix = torch.zeros(layer.routing.prefix_rows(), 20)
    triton_backend.rebuild(layer.x_TD, prefix, layer.pools, layer.routing)
    assert asked == [9 * 2 // 4] * (1 + 2 + 2)


def test_every_launch_is_on_the_device_of_x(monkeypatch):
    """Triton launches on the current device, which need not be that of the tensors."""
    layer, current = small(), []

    @contextmanager
    def device_of(tensor):
        current.append(tensor.device)
        yield
        current.pop()

    def on(real):
        return lambda *args, **more: current == [layer.x_TD.device] and real(*args, **more)

    for name in ("parts", "combine"):
        monkeypatch.setattr(triton_backend, name, on(getattr(triton_backend, name)))
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    arguments = layer.weights_TK, layer.pools, layer.routing
    _, h = triton_backend.forward(layer.x_TD, *arguments, layer.routing.num_rows)
    assert not triton_backend.rebuild(layer.x_TD, h[:0], layer.pools, layer.routing).isnan().all()
    found = triton_backend.backward(layer.grad_out_TD, layer.x_TD, h, *arguments, NEEDS[0])
    assert isinstance(found.x_TD, torch.Tensor) and current == []

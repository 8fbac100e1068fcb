from dataclasses import replace

import pytest
import torch

from esft_kernels.autograd_op import expert_mlp
from esft_kernels.backend import Needs
from esft_kernels.backends import cpu, cpu_packed, reference
from esft_kernels.pools import ExpertPools, ExpertWeights
from tests.esft_kernels.layers import TOLERANCE, assert_close, make_layer

EVERYTHING = Needs(True, True, True)


@pytest.fixture
def made(monkeypatch) -> list[torch.Tensor]:
    """What was packed so far."""
    found: list[torch.Tensor] = []
    real = cpu_packed._pack
    monkeypatch.setattr(cpu_packed, "_pack", lambda factor: found.append(factor) or real(factor))
    return found


@pytest.mark.parametrize("changed", ["gate_up_EGD", "down_EDF"])
@pytest.mark.parametrize("transposed", [False, True])
def test_frozen_experts_are_packed_once_and_again_after_a_change(transposed, changed, made):
    layer = make_layer(dtype=torch.float32, transposed=transposed)
    pools, frozen = layer.pools, 4

    def output() -> torch.Tensor:
        return expert_mlp(layer.x_TD, layer.weights_TK, pools, layer.routing, "cpu_packed")

    first = output()
    assert len(made) == 4 * frozen and torch.equal(output(), first) and len(made) == 4 * frozen
    getattr(pools.frozen, changed).mul_(2)
    second = output()
    assert len(made) == 8 * frozen and not torch.equal(second, first)
    assert_close(
        second, expert_mlp(layer.x_TD, layer.weights_TK, pools, layer.routing, "reference"), TOLERANCE[torch.float32]
    )


@pytest.mark.parametrize("changed", ["gate_up_EGD", "down_EDF"])
def test_other_memory_and_another_dtype_are_changes_too(changed, made):
    pools = make_layer(tokens=1, dtype=torch.float32, hidden=8, intermediate=4).pools
    cpu_packed._packed(pools)
    weights = getattr(pools.frozen, changed)
    version = weights._version
    weights.data = weights.data.clone()
    cpu_packed._packed(pools)
    assert len(made) == 8 * 4
    weights.data = weights.data.view(torch.bfloat16)[..., ::2]
    cpu_packed._packed(pools)
    assert weights._version == version and len(made) == 12 * 4


def test_views_of_the_same_weights_share_what_was_packed(made):
    pools = make_layer(tokens=1, dtype=torch.float32, hidden=8, intermediate=4).pools
    frozen = pools.frozen
    stored = frozen.gate_up_EGD.mT.contiguous()

    def viewed() -> ExpertPools:
        return replace(pools, frozen=ExpertWeights(stored.mT, frozen.down_EDF))

    first = cpu_packed._packed(viewed())
    assert cpu_packed._packed(viewed()) is first and len(made) == 4 * 4
    assert stored.esft_packed[1] is first


def test_other_views_of_the_same_memory_are_packed_anew(made):
    frozen = ExpertWeights(torch.randn(4, 8, 8), torch.randn(4, 8, 4))
    pools = replace(make_layer(tokens=1, dtype=torch.float32, hidden=8, intermediate=4).pools, frozen=frozen)
    turned = ExpertWeights(frozen.gate_up_EGD.mT, frozen.down_EDF)
    fewer = ExpertWeights(frozen.gate_up_EGD[:3], frozen.down_EDF[:3])
    for weights, count in ((frozen, 4), (turned, 4), (fewer, 3), (frozen, 4)):
        packed = cpu_packed._packed(replace(pools, frozen=weights))
        assert len(packed) == count
        out = torch.ops.mkldnn._linear_pointwise(torch.eye(8), packed[1]["up"], None, "none", [], "")
        assert_close(out, weights.gate_up_EGD[1].mT, TOLERANCE[torch.float32])


def test_every_product_of_every_frozen_expert_is_packed_by_its_name():
    pools = make_layer(tokens=1, dtype=torch.float32, hidden=8, intermediate=4).pools
    packed = cpu_packed._packed(pools)
    assert [set(factors) for factors in packed] == [{"up", "down", "grad_a", "grad_x"}] * 4
    product, plain = cpu_packed._Packed(pools), cpu.Products(pools)
    for factor, (inner, outer) in {"up": (8, 8), "down": (4, 8), "grad_a": (8, 4), "grad_x": (8, 8)}.items():
        for position in range(6):
            rows, out, expected = torch.randn(3, inner), torch.full((3, outer), -1.0), torch.empty(3, outer)
            product(factor, position, rows, out)
            plain(factor, position, rows, expected)
            assert_close(out, expected, TOLERANCE[torch.float32])


def test_only_frozen_experts_go_through_packed_weights(monkeypatch):
    pools = make_layer(tokens=1, dtype=torch.float32, hidden=8, intermediate=4).pools
    taken = []
    monkeypatch.setattr(cpu.Products, "__call__", lambda self, factor, position, rows, out: taken.append(position))
    product = cpu_packed._Packed(pools)
    for position in range(6):
        product("up", position, torch.randn(3, 8), torch.empty(3, 8))
    assert taken == [0, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", [{}, {"biased": True, "transposed": True}, {"trained": ()}], ids=str)
def test_the_three_functions_compute_the_layer_from_packed_weights(layout, dtype, monkeypatch):
    layer = make_layer(dtype=dtype, **layout)
    pools, routing, exact = layer.pools, layer.routing, layer.to(torch.float64)
    asked = []
    real = cpu_packed._packed
    monkeypatch.setattr(cpu_packed, "_packed", lambda pools: asked.append(pools) or real(pools))
    prefix = routing.prefix_rows()
    out, h = reference.forward(exact.x_TD, exact.weights_TK, exact.pools, routing, routing.num_rows)
    expected = reference.backward(exact.grad_out_TD, exact.x_TD, h, exact.weights_TK, exact.pools, routing, EVERYTHING)

    actual, kept = cpu_packed.forward(layer.x_TD, layer.weights_TK, pools, routing, prefix)
    assert_close(actual, out, TOLERANCE[dtype])
    assert_close(kept, h[:prefix], TOLERANCE[dtype])
    rebuilt = cpu_packed.rebuild(layer.x_TD, kept, pools, routing)
    assert_close(rebuilt, h, TOLERANCE[dtype])
    found = cpu_packed.backward(
        layer.grad_out_TD, layer.x_TD, rebuilt, layer.weights_TK, pools, routing, EVERYTHING
    )  # fmt: skip
    assert_close(found.x_TD, expected.x_TD, TOLERANCE[dtype])
    assert_close(found.weights_TK, expected.weights_TK, TOLERANCE[dtype])
    for a, b in zip(found.trained.tensors(), expected.trained.tensors(), strict=True):
        assert_close(a, b, TOLERANCE[dtype])
    assert asked == [pools] * 3


def test_packing_is_no_part_of_the_graph():
    pools = make_layer(tokens=1, dtype=torch.float32, hidden=8, intermediate=4).pools
    for weights in pools.frozen.tensors()[:2]:
        weights.requires_grad_()
    assert not any(weight.requires_grad for factors in cpu_packed._packed(pools) for weight in factors.values())


def test_packed_weights_go_with_the_plain_ones():
    layer = make_layer(dtype=torch.float32)
    pools = layer.pools
    expert_mlp(layer.x_TD, layer.weights_TK, pools, layer.routing, "cpu_packed")
    assert len(pools.frozen.gate_up_EGD.esft_packed[1]) == 4
    assert not hasattr(layer.pools.frozen.gate_up_EGD, "esft_packed")


def test_quantized_weights_are_refused():
    layer = make_layer(dtype=torch.float32, format="nf4")
    with pytest.raises(ValueError, match="^backend 'cpu_packed' packs plain weights, got nf4, which 'cpu' computes$"):
        cpu_packed.forward(layer.x_TD, layer.weights_TK, layer.pools, layer.routing, 0)

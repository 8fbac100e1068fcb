from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")
from esft_kernels.backends import triton_parts as module
from esft_kernels.backends.triton_parts import parts
from esft_kernels.formats.resolve import FORMATS
from esft_kernels.pools import ExpertPools, ExpertWeights, QuantizedWeights, dequantize, quantize
from esft_kernels.routing import Routing, route

S, R, D, F = 2, 5, 12, 7


def layer(name: str = "int8", trained: int = S, frozen: int = R, tokens: int = 21) -> tuple[ExpertPools, Routing]:
    def weights(n: int) -> ExpertWeights:
        return ExpertWeights(torch.randn(n, 2 * F, D), torch.randn(n, D, F), torch.randn(n, 2 * F), torch.randn(n, D))

    held = weights(frozen) if name == "plain" else quantize(weights(frozen), name)
    experts = trained + frozen
    routing = route(torch.randint(experts, (tokens, 1)), torch.arange(experts), trained)
    return ExpertPools(weights(trained), held), routing


def test_plain_pools_are_one_part():
    pools, routing = layer("plain")
    (part,) = parts(pools, routing, "down")
    assert part.pools == pools and part.routing.num_trained == S and part.rows_per_expert is None
    assert torch.equal(part.routing.offsets_E1, routing.offsets_E1)
    (part,) = parts(pools, routing, "gate_up", first=S)
    assert part.routing.num_trained == 0 and torch.equal(part.routing.offsets_E1, routing.offsets_E1[S:])


def test_with_few_rows_the_frozen_experts_are_one_part_in_their_format(monkeypatch):
    monkeypatch.setattr(module, "FEW_ROWS", 4)
    pools, routing = layer()
    trained, frozen = parts(pools, routing, "down")
    assert trained.routing.num_trained == S and torch.equal(trained.routing.offsets_E1, routing.offsets_E1[: S + 1])
    assert trained.pools.trained is pools.trained and trained.pools.frozen.num_experts == 0
    assert frozen.routing.num_trained == 0 and torch.equal(frozen.routing.offsets_E1, routing.offsets_E1[S:])
    assert frozen.pools.frozen is pools.frozen
    assert trained.rows_per_expert == frozen.rows_per_expert == 3
    assert trained.routing.token_N is routing.token_N


@pytest.mark.parametrize(("rows", "in_loads"), [(7, True), (8, True), (9, False), (64, False)])
def test_few_rows_are_one_for_every_eight_experts(rows, in_loads):
    pools, routing = layer(trained=2, frozen=62, tokens=rows)
    assert routing.num_rows == rows and routing.num_experts == 64
    *_, last = parts(pools, routing, "down")
    assert isinstance(last.pools.frozen, QuantizedWeights) == in_loads


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("projection", ["gate_up", "down"])
@pytest.mark.parametrize("experts", [1, 2, 5])
def test_with_many_rows_they_are_decoded_some_at_a_time_into_one_scratch(name, projection, experts, monkeypatch):
    pools, routing = layer(name)
    size = {"gate_up": 2 * F * D, "down": D * F}[projection] * 4
    monkeypatch.setattr(module, "SCRATCH", size * experts + 3)
    assert isinstance(pools.frozen, QuantizedWeights)
    plain = dequantize(pools.frozen, torch.float32)
    position, places = S, set()
    for number, part in enumerate(parts(pools, routing, projection)):
        if number == 0:
            assert part.routing.num_trained == S
            continue
        frozen = part.pools.frozen
        assert isinstance(frozen, ExpertWeights) and part.routing.num_trained == 0
        matrices = frozen.gate_up_EGD if projection == "gate_up" else frozen.down_EDF
        whole = plain.gate_up_EGD if projection == "gate_up" else plain.down_EDF
        here = slice(position - S, position - S + len(matrices))
        assert len(matrices) <= experts and torch.equal(matrices, whole[here])
        assert frozen.gate_up_bias_EG is not None and pools.frozen.gate_up_bias_EG is not None
        assert torch.equal(frozen.gate_up_bias_EG, pools.frozen.gate_up_bias_EG[here])
        assert frozen.down_bias_ED is not None and pools.frozen.down_bias_ED is not None
        assert torch.equal(frozen.down_bias_ED, pools.frozen.down_bias_ED[here])
        offsets = routing.offsets_E1[position : position + len(matrices) + 1]
        assert torch.equal(part.routing.offsets_E1, offsets)
        position += len(matrices)
        places.add(matrices.data_ptr())
    assert position == S + R and len(places) == 1


@pytest.mark.parametrize("few_rows", [0, 128])
def test_pools_without_experts_are_no_part(few_rows, monkeypatch):
    monkeypatch.setattr(module, "FEW_ROWS", few_rows)
    pools, routing = layer(trained=0)
    assert [part.routing.num_trained for part in parts(pools, routing, "down")] == [0]
    pools, routing = layer(frozen=0)
    assert [part.routing.num_trained for part in parts(pools, routing, "down")] == [S]
    pools, routing = layer()
    assert [part.routing.num_trained for part in parts(pools, routing, "down", first=S)] == [0]


def test_a_scratch_holds_one_expert_at_least(monkeypatch):
    monkeypatch.setattr(module, "SCRATCH", 1)
    pools, routing = layer()
    assert len(list(parts(pools, replace(routing), "down"))) == 1 + R


def test_what_has_no_biases_has_none_in_its_parts(monkeypatch):
    trained, frozen = (ExpertWeights(torch.randn(n, 2 * F, D), torch.randn(n, D, F)) for n in (S, R))
    pools = ExpertPools(trained, quantize(frozen, "int8"))
    for rows in (0, 128):
        monkeypatch.setattr(module, "FEW_ROWS", rows)
        for part in parts(pools, layer()[1], "down"):
            assert part.pools.frozen.gate_up_bias_EG is None and part.pools.frozen.down_bias_ED is None

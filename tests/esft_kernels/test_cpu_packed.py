import pytest
import torch

from esft_kernels import cpu_packed
from esft_kernels.expert_mlp import expert_mlp
from tests.esft_kernels.layers import TOLERANCE, assert_close, make_layer


@pytest.mark.parametrize("transposed", [False, True])
def test_frozen_experts_are_packed_once_and_again_after_a_change(transposed, monkeypatch):
    made: list[torch.Tensor] = []
    real = cpu_packed._pack
    monkeypatch.setattr(cpu_packed, "_pack", lambda factor: made.append(factor) or real(factor))
    layer = make_layer(dtype=torch.float32, transposed=transposed)
    pools, frozen = layer.pools, 4

    def output() -> torch.Tensor:
        return expert_mlp(layer.x_TD, layer.weights_TK, pools, layer.routing, "cpu_packed")

    first = output()
    assert len(made) == 4 * frozen and torch.equal(output(), first) and len(made) == 4 * frozen
    pools.frozen.down_EDF.mul_(2)
    changed = output()
    assert len(made) == 8 * frozen and not torch.equal(changed, first)
    assert_close(
        changed, expert_mlp(layer.x_TD, layer.weights_TK, pools, layer.routing, "reference"), TOLERANCE[torch.float32]
    )


def test_packed_weights_go_with_the_plain_ones():
    layer = make_layer(dtype=torch.float32)
    pools = layer.pools
    expert_mlp(layer.x_TD, layer.weights_TK, pools, layer.routing, "cpu_packed")
    assert len(pools.frozen.gate_up_EGD.esft_packed[1]) == 4
    assert not hasattr(layer.pools.frozen.gate_up_EGD, "esft_packed")

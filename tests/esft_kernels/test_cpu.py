import pytest
import torch

from esft_kernels import cpu, reference
from esft_kernels.pools import Needs
from tests.esft_kernels.layers import TOLERANCE, assert_close, make_layer, poison_empty


def test_groups_cover_the_rows_in_order_and_hold_no_more_than_they_may():
    offsets = [0, 3, 3, 5, 6, 20, 21, 22, 22]
    groups = cpu._groups(offsets, 0, 8, most_rows=6)
    assert [group.spans for group in groups] == [
        [(0, 0, 3), (2, 3, 5), (3, 5, 6)],  # position 1 has no rows
        [(4, 6, 20)],  # more than may be together, alone
        [(5, 20, 21), (6, 21, 22)],
    ]
    assert [group.size for group in cpu._groups(offsets, 0, 8, most_rows=0)] == [3, 2, 1, 14, 1, 1]
    assert cpu._groups(offsets, 7, 8, most_rows=6) == []


@pytest.mark.parametrize("rows", [0, 15, 60, 1000])
@pytest.mark.parametrize("biased", [False, True])
def test_any_grouping_computes_the_layer(rows, biased, monkeypatch):
    layer = make_layer(tokens=64, experts=9, trained=(4, 1, 8), biased=biased)
    pools, routing, needs = layer.pools, layer.routing, Needs(True, True, True)
    out, h_NG = reference.forward(layer.x_TD, layer.weights_TK, pools, routing, routing.num_rows)
    expected = reference.backward(layer.grad_out_TD, layer.x_TD, h_NG, layer.weights_TK, pools, routing, needs)

    monkeypatch.setattr(cpu, "_most_rows", lambda pools, dtype: rows)
    poison_empty(monkeypatch)
    for keep in (0, routing.prefix_rows(), routing.num_rows):
        mine, kept = cpu.forward(layer.x_TD, layer.weights_TK, pools, routing, keep)
        assert_close(mine, out, TOLERANCE[torch.float64])
        assert_close(kept, h_NG[:keep], TOLERANCE[torch.float64])
    rebuilt = cpu.rebuild(layer.x_TD, h_NG[: routing.prefix_rows()], pools, routing)
    assert_close(rebuilt, h_NG, TOLERANCE[torch.float64])
    found = cpu.backward(layer.grad_out_TD, layer.x_TD, h_NG, layer.weights_TK, pools, routing, needs)
    assert_close(found.x_TD, expected.x_TD, TOLERANCE[torch.float64])
    assert_close(found.weights_TK, expected.weights_TK, TOLERANCE[torch.float64])
    assert found.trained is not None and expected.trained is not None
    for a, b in zip(found.trained.tensors(), expected.trained.tensors(), strict=True):
        assert_close(a, b, TOLERANCE[torch.float64])

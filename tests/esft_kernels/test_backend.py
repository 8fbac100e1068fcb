import dataclasses
from itertools import product

import pytest
import torch

from esft_kernels.backend import Gradients, Needs
from esft_kernels.pools import ExpertPools
from tests.esft_kernels.layers import numbered_weights

D, F = 3, 5


@pytest.mark.parametrize(("x", "routing_weights", "trained"), product([False, True], repeat=3))
def test_frozen_rows_take_part_where_x_or_the_routing_weights_need_a_gradient(x, routing_weights, trained):
    needs = Needs(x=x, weights=routing_weights, trained=trained)
    assert needs.all_rows == (x or routing_weights)
    assert needs == Needs(x, routing_weights, trained)


def test_gradients_are_those_of_x_the_routing_weights_and_the_trained_pool():
    x, routing_weights, trained = torch.zeros(4, D), torch.zeros(4, 2), numbered_weights(1, 0)
    gradients = Gradients(x, routing_weights, trained)
    assert gradients.x_TD is x and gradients.weights_TK is routing_weights and gradients.trained is trained


@pytest.mark.parametrize(
    ("value", "field"),
    [
        (numbered_weights(1, 0), "down_EDF"),
        (ExpertPools(numbered_weights(1, 0), numbered_weights(1, 1)), "frozen"),
        (Needs(True, True, True), "x"),
        (Gradients(None, None, None), "trained"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_none_of_them_can_be_changed(value, field):
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, field, None)

import dataclasses
from itertools import product

import pytest
import torch

from esft_kernels.backend import Gradients, Needs
from esft_kernels.pools import ExpertPools, ExpertWeights

D, F = 3, 5


def weights(experts: int, first: int, columns: int = 2 * F, biased: bool = True) -> ExpertWeights:
    """Weights whose values say which expert, counted from ``first``, and which tensor they are of."""

    def filled(tensor: int, *shape: int) -> torch.Tensor:
        numbers = 10.0 * torch.arange(first, first + experts) + tensor
        return numbers.view(-1, *[1] * len(shape)).expand(experts, *shape)

    biases = (filled(2, columns), filled(3, D)) if biased else ()
    return ExpertWeights(filled(0, columns, D), filled(1, D, F), *biases)


@pytest.mark.parametrize(("x", "routing_weights", "trained"), product([False, True], repeat=3))
def test_frozen_rows_take_part_where_x_or_the_routing_weights_need_a_gradient(x, routing_weights, trained):
    needs = Needs(x=x, weights=routing_weights, trained=trained)
    assert needs.all_rows == (x or routing_weights)
    assert needs == Needs(x, routing_weights, trained)


def test_gradients_are_those_of_x_the_routing_weights_and_the_trained_pool():
    x, routing_weights, trained = torch.zeros(4, D), torch.zeros(4, 2), weights(1, 0)
    gradients = Gradients(x, routing_weights, trained)
    assert gradients.x_TD is x and gradients.weights_TK is routing_weights and gradients.trained is trained


@pytest.mark.parametrize(
    ("value", "field"),
    [
        (weights(1, 0), "down_EDF"),
        (ExpertPools(weights(1, 0), weights(1, 1)), "frozen"),
        (Needs(True, True, True), "x"),
        (Gradients(None, None, None), "trained"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_none_of_them_can_be_changed(value, field):
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, field, None)

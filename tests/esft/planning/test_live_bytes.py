import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from esft.planning.live_bytes import LiveBytes, TooMany


def test_what_lives_and_what_lived_at_most_is_counted_and_views_are_not():
    known = torch.zeros(100)
    with LiveBytes([known]) as live:
        a = torch.zeros(10)
        b = a + 1
        view, of_known = a.view(2, 5)[0], known[:50]
        assert live.now == live.peak == 80
        del a
        assert live.now == 80  # the view holds it
        del view
        assert live.now == 40 and live.peak == 80
        c = torch.empty(5, dtype=torch.float64)
        assert live.now == live.peak == 80
        b.add_(1)
        assert live.peak == 80
        del b, c
        small = torch.zeros(2)
        assert (live.now, live.peak) == (8, 80)
        del small
    assert live.now == 0 and of_known.numel() == 50


def test_more_operations_than_are_allowed_are_not_done():
    one = torch.ones(1)
    with LiveBytes() as live:
        live.left = 2
        one.add_(1).add_(1)
        with pytest.raises(TooMany):
            one.add_(1)
    assert one.item() == 3


def test_gradients_and_what_a_backward_makes_are_counted():
    weight = torch.ones(50, requires_grad=True)
    with LiveBytes([weight]) as live:
        squared = weight * weight
        kept = live.now
        squared.sum().backward()
        del squared
    assert kept == 200
    assert live.now == weight.grad.nbytes == 200
    assert live.peak >= 600  # the square, and both of its factors' gradients


def test_fake_tensors_take_what_real_ones_would():
    def work() -> None:
        x = torch.empty(64, 32, requires_grad=True)
        ((x @ x.T).relu() ** 2).sum().backward()

    with LiveBytes() as real:
        work()
    with FakeTensorMode(), LiveBytes() as fake:
        work()
    assert real.peak == fake.peak > 4 * 64 * 64

"""Experts that take memory only, beside those that compute."""

import pytest
import torch

from esft.experts.pooled_experts import Experts
from esft.planning.live_bytes import LiveBytes
from esft.planning.stand_in import Sizes, StandIn, _scratch
from esft_kernels.backends.cpu import CACHE, rounded

E, D, F, T, K = 8, 64, 48, 512, 2


def routed() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs of which every expert gets as many rows."""
    index = torch.stack([torch.arange(T) % E, (torch.arange(T) + 1) % E], dim=1)
    return torch.randn(T, D).bfloat16(), index, torch.rand(T, K)


def taken(experts: torch.nn.Module, needs_x: bool) -> tuple[int, int, int]:
    """Bytes kept for the backward, at most, and left as gradients."""
    x, index, weights = routed()
    x.requires_grad_(needs_x)
    weights.requires_grad_(needs_x)
    with LiveBytes([*experts.parameters(), *experts.buffers(), x, index, weights]) as live:
        out = experts(x, index, weights)
        kept = live.now
        if out.requires_grad:
            out.sum().backward()
        del out
    return kept, live.peak, live.now


@pytest.mark.parametrize("recompute", ["none", "frozen"])
@pytest.mark.parametrize("needs_x", [True, False])
@pytest.mark.parametrize("trained", [0, 3, 8])
def test_it_takes_the_memory_of_the_experts_in_whose_place_it_is(trained: int, needs_x: bool, recompute: str):
    torch.manual_seed(0)
    weights = torch.randn(E, 2 * F, D).bfloat16(), torch.randn(E, D, F).bfloat16()
    real = Experts(*weights, list(range(trained)), "cpu", recompute)
    sizes = Sizes(E, trained, (2 * F, D, F), trained / E, recompute)
    kept, most, left = taken(real, needs_x)
    found_kept, found_most, found_left = taken(StandIn(sizes, torch.bfloat16), needs_x)
    assert found_left == left
    assert found_kept == pytest.approx(kept, rel=0.05, abs=4096)
    assert found_most == pytest.approx(most, rel=0.1)


def test_buffers_are_as_long_as_the_largest_expert_or_as_many_together_as_the_cache_holds():
    sizes = Sizes(8, 2, (2 * F, D, F), 0.25)
    cache = CACHE // ((2 * F + D + F) * 2)
    assert sizes.prefix(1004) == 251 < cache < 30_000
    assert sizes.longest(1004, 2, backward=True, all_rows=False) == rounded(126)  # of one of two experts
    assert sizes.longest(1004, 2, backward=False) == rounded(753)  # all that are frozen, together
    assert sizes.longest(100_000, 2, backward=False) == rounded(max(cache, 12_500))
    assert Sizes(8, 8, (2 * F, D, F), 0.25).prefix(100) == 100 and Sizes(8, 0, (2 * F, D, F), 0.25).prefix(100) == 0


def test_its_trained_pool_is_that_of_the_experts():
    stand_in = StandIn(Sizes(E, 3, (2 * F, D, F), 0.2, biased=True), torch.bfloat16)
    shapes = [tuple(p.shape) for p in stand_in.parameters()]
    assert shapes == [(3, 2 * F, D), (3, D, F), (3, 2 * F), (3, D)]
    assert all(p.requires_grad and p.dtype == torch.bfloat16 for p in stand_in.parameters())
    none = StandIn(Sizes(E, 0, (2 * F, D, F), 0.2), torch.bfloat16)
    assert not any(p.requires_grad for p in none.parameters())


def test_low_rank_additions_take_sums_with_all_weights_and_every_row_of_every_step():
    plain, adapted = (
        taken(StandIn(Sizes(E, 0, (2 * F, D, F), 0.0, adapted=adapted), torch.bfloat16), True)
        for adapted in (False, True)
    )
    weights = 2 * E * 3 * D * F
    rows = 2 * T * K * (2 * D + 4 * F)
    assert adapted[0] - plain[0] == weights + rows - 2 * T * K * 2 * F
    assert adapted[1] >= plain[1] + 2 * weights


def test_no_tokens_take_nothing_but_gradients():
    stand_in = StandIn(Sizes(E, 3, (2 * F, D, F), 0.2), torch.bfloat16)
    empty = torch.empty(0, D, dtype=torch.bfloat16, requires_grad=True)
    out = stand_in(empty, torch.empty(0, K, dtype=torch.int64), torch.empty(0, K))
    out.sum().backward()
    assert out.shape == (0, D) and all(p.grad.shape == p.shape for p in stand_in.parameters())


def test_a_share_of_rows_that_experts_do_not_divide_is_the_largest_ones():
    sizes = Sizes(8, 2, (2 * F, D, F), 0.25)
    assert sizes.longest(20, 2, backward=True, all_rows=False) == 3  # of 5 rows, of two experts
    assert sizes.longest(20, 2, backward=False, all_rows=False) == 5  # both together
    assert sizes.longest(20, 2, backward=True) == 15  # those of all that are frozen


def test_a_pass_has_buffers_weights_of_the_rows_and_room_to_unpack():
    sizes = Sizes(E, 2, (2 * F, D, F), 0.25, scratch=77)
    buffers, weights, room = _scratch(torch.empty(1, dtype=torch.bfloat16), sizes, 40, 9, 100)
    assert (buffers.nbytes, weights.nbytes, room.nbytes) == (40 * 9 * 2, 100 * 2, 77)


def test_under_autocast_inputs_are_kept_in_the_dtype_of_the_weights():
    kept: list[torch.Tensor] = []
    x, index, weights = routed()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = StandIn(Sizes(E, 3, (2 * F, D, F), 0.2), torch.bfloat16)(x.float(), index, weights)
    assert out.dtype == torch.float32
    assert [t.dtype for t in kept if t.shape == x.shape] == [torch.bfloat16]
    assert [t.dtype for t in kept if t.shape == weights.shape] == [torch.float32]

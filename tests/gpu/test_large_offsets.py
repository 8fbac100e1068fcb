"""Tensors of more than 2**31 elements: whatever is far from their beginning is found, and is right.

Few rows take part, so that the reference can compute all that matters from a part of the weights.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from esft_kernels.autograd_op import expert_mlp
from esft_kernels.backends.resolve import resolve_backend
from esft_kernels.pools import ExpertPools, ExpertWeights
from tests.esft_kernels.layers import TOLERANCE, assert_close
from tests.esft_kernels.test_fuzz import RESULTS as ALL_RESULTS
from tests.gpu.device import DEVICE, REHEARSAL, sized

BF16, FP64 = torch.bfloat16, torch.float64
RESULTS = ALL_RESULTS[:5]


def weights_of(experts: int, hidden: int, intermediate: int) -> ExpertWeights:
    return ExpertWeights(
        torch.randn(experts, 2 * intermediate, hidden, dtype=BF16, device=DEVICE).mul_(hidden**-0.5),
        torch.randn(experts, hidden, intermediate, dtype=BF16, device=DEVICE).mul_(intermediate**-0.5),
    )


def run(x: Tensor, weights: Tensor, ids: Tensor, pools: ExpertPools, grad_out: Tensor, backend: str) -> list[Tensor]:
    """Output, and the gradients of x, the routing weights and the trained pool."""
    x, weights = x.detach().requires_grad_(), weights.detach().requires_grad_()
    trained = [t.detach().requires_grad_() for t in (pools.trained.gate_up_EGD, pools.trained.down_EDF)]
    pools = replace(pools, trained=ExpertWeights(*trained))
    identity = torch.arange(pools.num_experts, device=DEVICE)
    routing = resolve_backend(backend, DEVICE).route(ids, identity, pools.num_trained)
    out = expert_mlp(x, weights, pools, routing, backend)
    return [out.detach(), *torch.autograd.grad(out, [x, weights, *trained], grad_out)]


def of_some(weights: ExpertWeights, experts: list[int]) -> ExpertWeights:
    return ExpertWeights(*(torch.stack([t[e] for e in experts]).to(FP64) for t in weights.tensors()[:2]))


def ends(tensor: Tensor, few: int) -> Tensor:
    return torch.cat([tensor[:few], tensor[-few:]])


@pytest.mark.parametrize("many_trained", [True, False], ids=["trained", "frozen"])
def test_of_a_large_pool_the_last_expert_is_as_right_as_the_first(many_trained, much_memory):
    many, (d, f), tokens = sized(130, 5), sized((4096, 4096), (32, 16)), sized(60, 6)
    s, r = (many, 2) if many_trained else (2, many)
    pools = ExpertPools(weights_of(s, d, f), weights_of(r, d, f))
    large = (pools.trained if many_trained else pools.frozen).tensors()[:2]
    assert REHEARSAL or all(t.numel() > 2**31 for t in large)
    # Two of each pool, among them the last of all.
    used = torch.tensor([0, s - 1, s, s + r - 1], device=DEVICE)
    chosen = torch.stack([torch.randperm(4)[:3] for _ in range(tokens)]).to(DEVICE)
    x, grad_out = (torch.randn(tokens, d, dtype=BF16, device=DEVICE) for _ in range(2))
    weights = torch.rand(tokens, 3, device=DEVICE)
    found = run(x, weights, used[chosen], pools, grad_out, "triton")
    part = ExpertPools(of_some(pools.trained, [0, s - 1]), of_some(pools.frozen, [0, r - 1]))
    expected = run(x.to(FP64), weights, chosen, part, grad_out.to(FP64), "reference")
    unused = [grad[1 : s - 1] for grad in found[3:]]
    assert not any(bool(one.any()) for grad in unused for one in grad)
    found[3:] = [torch.stack([grad[0], grad[s - 1]]) for grad in found[3:]]
    for what, a, b in zip(RESULTS, found, expected, strict=True):
        assert_close(a, b, TOLERANCE[BF16], what)


def test_with_many_rows_the_last_are_as_right_as_the_first(much_memory):
    """x, H, the rows that go into the sums, and their gradients: all of them have more than 2**31 elements."""
    tokens, (d, f), experts, few = sized(2_100_000, 60), sized((1024, 512), (16, 16)), 6, sized(40, 4)
    assert REHEARSAL or min(tokens * d, tokens * 2 * f) > 2**31
    pools = ExpertPools(weights_of(2, d, f), weights_of(experts - 2, d, f))
    x = torch.randn(tokens, d, dtype=BF16, device=DEVICE)
    weights, ids = torch.rand(tokens, 1, device=DEVICE), torch.randint(experts, (tokens, 1), device=DEVICE)
    grad_out = torch.zeros_like(x)  # but at both ends, so that these alone make up the weights' gradients
    for end in (grad_out[:few], grad_out[-few:]):
        end.normal_()
    found = run(x, weights, ids, pools, grad_out, "triton")
    part = ExpertPools(of_some(pools.trained, [0, 1]), of_some(pools.frozen, list(range(experts - 2))))
    some_x, some_grad, some_weights, some_ids = (ends(t, few) for t in (x, grad_out, weights, ids))
    expected = run(some_x.to(FP64), some_weights, some_ids, part, some_grad.to(FP64), "reference")
    assert not bool(found[2][few:-few].any())
    assert all(bool(piece.isfinite().all()) for piece in found[0].split(100_000))
    found[:3] = [ends(t, few) for t in found[:3]]
    for what, a, b in zip(RESULTS, found, expected, strict=True):
        assert_close(a, b, TOLERANCE[BF16], what)

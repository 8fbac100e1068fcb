import pytest
import torch
from torch import Tensor, nn

import esft
from esft.experts.moe_layers import moe_layers
from esft.experts.plain_experts import PlainExperts, plain_mlp
from esft.experts.pooled_experts import Experts
from esft.selection import ExpertSelection
from esft_kernels.pools import ExpertPools, ExpertWeights
from tests.esft import zoo

E, D, F_ = 5, 4, 3


def gate(h: Tensor) -> Tensor:
    """No activation of the kernels."""
    return h[:, :F_].tanh() * h[:, F_:].cos()


class Norm(nn.Module):
    """Neither linear nor blind to a factor, so its place shows."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(D, dtype=torch.float64))

    def forward(self, y: Tensor) -> Tensor:
        assert y.dim() == 2 and y.shape[1] == D
        return self.weight * y / (1 + y.square().sum(-1, keepdim=True)) + 0.1


def all_weights(biased: bool) -> list[Tensor]:
    shapes = [(E, 2 * F_, D), (E, D, F_), *([(E, 2 * F_), (E, D)] if biased else [])]
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


def pools_of(weights: list[Tensor], trained: int) -> ExpertPools:
    """The first experts in the trained pool, as leaves that want a gradient, the others in the frozen one."""
    return ExpertPools(
        ExpertWeights(*(w[:trained].clone().requires_grad_() for w in weights)),
        ExpertWeights(*(w[trained:].clone() for w in weights)),
    )


def by_hand(x: Tensor, position: Tensor, routing: Tensor, weights: list[Tensor], norm: nn.Module | None) -> Tensor:
    rows = []
    for t in range(len(x)):
        row = torch.zeros(D, dtype=x.dtype)
        for p, weight in zip(position[t].tolist(), routing[t], strict=True):
            if p < E:
                up, down, *biases = (w[p] for w in weights)
                up_bias, down_bias = biases or (0, 0)
                y = down @ gate((up @ x[t] + up_bias)[None])[0] + down_bias
                row = row + weight * (y if norm is None else norm(y[None])[0])
        rows.append(row)
    return torch.stack(rows)


# Expert 3 is chosen by nobody, the last token's only by experts that are not here, and E is the first that is not.
POSITIONS = torch.tensor([[0, 4], [2, E], [4, 1], [1, 0], [E + 2, E]])


@pytest.mark.parametrize("trained", [0, 2, E])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("norm", [None, Norm])
def test_outputs_and_gradients_are_those_of_one_token_and_expert_at_a_time(trained: int, biased: bool, norm):
    norm = norm and norm()
    weights = all_weights(biased)
    pools = pools_of(weights, trained)
    inputs = [torch.randn(5, D).double().requires_grad_(), torch.rand(5, 2).double().requires_grad_()]
    found = plain_mlp(inputs[0], POSITIONS, inputs[1], pools, gate, norm)
    leaves = [w.clone().requires_grad_() for w in weights]
    expected = by_hand(inputs[0], POSITIONS, inputs[1], leaves, norm)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    assert not found[4].any()
    direction = torch.randn(5, D).double()
    shared = [*inputs, *([] if norm is None else [norm.weight])]
    wanted = torch.autograd.grad((expected * direction).sum(), [*shared, *leaves])
    own = [t for t in pools.trained.tensors() if t is not None]
    gradients = torch.autograd.grad((found * direction).sum(), [*shared, *own], allow_unused=not trained)
    for ours, theirs in zip(gradients[: len(shared)], wanted, strict=False):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)
    for ours, theirs in zip(gradients[len(shared) :], wanted[len(shared) :], strict=True):
        if trained:
            torch.testing.assert_close(ours, theirs[:trained], atol=1e-12, rtol=1e-12)


def test_only_chosen_experts_compute_each_once_for_its_own_tokens():
    rows = []

    def counted(h: Tensor) -> Tensor:
        rows.append(len(h))
        return gate(h)

    plain_mlp(torch.randn(5, D).double(), POSITIONS, torch.rand(5, 2), pools_of(all_weights(False), 2), counted)
    assert rows == [2, 2, 1, 2]  # of the experts 0, 1, 2 and 4


def test_the_output_has_the_dtype_of_x_whatever_the_routing_weights_have():
    pools = pools_of([w.bfloat16() for w in all_weights(True)], 2)
    x, routing = torch.randn(5, D).bfloat16(), torch.rand(5, 2)
    found = plain_mlp(x, POSITIONS, routing, pools, gate)
    assert found.dtype == torch.bfloat16 and found.shape == (5, D)
    assert found[:4].count_nonzero()


@pytest.mark.parametrize("tokens", [0, 3])
def test_without_tokens_or_without_experts_for_them_nothing_is_added(tokens: int):
    pools = pools_of(all_weights(True), 2)
    found = plain_mlp(torch.randn(tokens, D).double(), torch.full((tokens, 2), E), torch.rand(tokens, 2), pools, gate)
    assert found.shape == (tokens, D) and not found.any()


@pytest.mark.parametrize("trained", [0, 2])
def test_what_no_row_here_depends_on_gets_zeros_as_its_gradient(trained: int):
    pools = pools_of(all_weights(True), trained)
    leaves = [torch.full((3, D), torch.inf).double().requires_grad_(), torch.rand(3, 2).requires_grad_()]
    leaves += [t for t in pools.trained.tensors() if t is not None]
    for asked in (leaves, leaves[:1], leaves[1:2], leaves[2:]):
        out = plain_mlp(leaves[0], torch.full((3, 2), E), leaves[1], pools, gate)
        found = torch.autograd.grad(out.sum(), asked)
        assert not out.any() and all(g.shape == t.shape and not g.any() for g, t in zip(found, asked, strict=True))


@pytest.mark.parametrize("norm", [None, Norm])
def test_the_module_looks_experts_up_by_id_and_is_otherwise_experts(norm):
    norm = norm and norm()
    gate_up, down, *biases = all_weights(True)
    names = {"gate_up_bias": biases[0], "down_bias": biases[1]}
    module = PlainExperts(gate_up, down, [3, 1], "reference", "frozen", gate=gate, norm=norm, **names)
    assert isinstance(module, Experts)
    assert (module.trained, module.backend, module.recompute) == ((3, 1), "reference", "frozen")
    assert module.gate is gate and module.post_expert_norm is norm
    pools = {f"{pool}_{name}" for pool in ("trained", "frozen") for name in ("gate_up_proj", "down_proj")}
    pools |= {f"{name}_bias" for name in pools} | ({"post_expert_norm.weight"} if norm else set())
    assert module.state_dict().keys() == pools
    x, index, routing = torch.randn(4, D).double(), torch.tensor([[3, 0], [1, 2], [4, 3], [2, 0]]), torch.rand(4, 2)
    found = module(x, index, routing)
    expected = by_hand(x, index, routing.double(), [gate_up, down, *biases], norm)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    found.sum().backward()
    for expert, bias in zip((3, 1), module.trained_down_proj_bias.grad, strict=True):
        if norm is None:  # whose gradient is then the sum of the expert's routing weights
            torch.testing.assert_close(bias, routing[index == expert].sum().double().expand(D))
    assert module.frozen_down_proj.grad is None


@pytest.mark.parametrize(("of_x", "of_weights"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_the_module_computes_in_the_dtype_of_its_weights_and_returns_that_of_its_input(of_x, of_weights):
    module = PlainExperts(*(w.to(of_weights) for w in all_weights(False)), [2], gate=gate)
    x, index, routing = torch.randn(3, D).to(of_x), torch.tensor([[0, 2], [2, 1], [4, 3]]), torch.rand(3, 2)
    found = module(x, index, routing)
    assert found.dtype == of_x
    assert torch.equal(found, module(x.to(of_weights), index, routing).to(of_x))


def test_experts_without_the_decorator_and_with_a_gate_of_their_own_train_through_plain_pytorch():
    # Its experts clamp the activation's value, which the kernels cannot: they clamp before it.
    config = {"swiglu_limits": [0.02, 0.02], "sliding_window": 16}
    stock, swapped = zoo.tiny("step3p7", **config), zoo.tiny("step3p7", **config)
    layers = moe_layers(stock)
    with pytest.warns(UserWarning, match="Step3p7Experts: the kernels do not compute these experts"):
        esft.swap(swapped, ExpertSelection({layers[-1].index: [3, 6]}))
    direction = torch.randn(2, 9, 32)
    for model in (stock, swapped):
        (model(input_ids=zoo.tokens(), use_cache=False).last_hidden_state * direction).mean().backward()
    expected = layers[-1].experts.gate_up_proj.grad[[3, 6]]
    found = moe_layers(swapped)[-1].experts.trained_gate_up_proj.grad
    assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()
    assert expected.count_nonzero()

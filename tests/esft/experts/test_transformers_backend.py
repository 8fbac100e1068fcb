import copy

import pytest
import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import esft
import esft.experts.transformers_backend as interface
from esft.experts.moe_layers import moe_layers
from tests.esft import zoo


def experts_of(family: str) -> nn.Module:
    """The experts of a family's first MoE layer, behind our implementation."""
    model = zoo.tiny(family)
    model.set_experts_implementation("esft")
    return moe_layers(model)[0].experts


def batch(experts: nn.Module, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    d = experts.down_proj.shape[2 if getattr(experts, "is_transposed", False) else 1]
    index = torch.tensor([[0, 3, 7], [5, 1, 2], [6, 4, 0], [2, 3, 4]])
    return torch.randn(4, d, dtype=dtype, requires_grad=True), index, torch.rand(4, 3, requires_grad=True)


def run_and_pull(experts: nn.Module, x: Tensor, index: Tensor, weights: Tensor) -> tuple[Tensor, list[Tensor | None]]:
    """The output, and the gradients of x, the routing weights and every parameter."""
    inputs = [t.detach().clone().requires_grad_() for t in (x, weights)]
    out = experts(inputs[0], index, inputs[1])
    (out * torch.arange(out.numel()).view_as(out).sin()).sum().backward()
    return out, [t.grad for t in (*inputs, *experts.parameters())]


# Of each what the others lack: biases and transposed weights, no gate, a norm, a function of their own.
VARIANTS = ["mixtral", "gpt_oss", "nemotron_h", "muse_spark", "inkling2"]


@pytest.mark.parametrize("family", VARIANTS)
@pytest.mark.parametrize("trains", ["all", "down_proj", "none"])
def test_outputs_and_gradients_are_those_of_the_modules_own_loop(family: str, trains: str):
    ours = experts_of(family)
    for name, parameter in ours.named_parameters():
        parameter.requires_grad_(trains in ("all", name))
    stock = copy.deepcopy(ours)
    stock.config = copy.deepcopy(ours.config)
    stock.config._experts_implementation = "eager"
    args = batch(ours)
    (expected, wanted), (found, gradients) = run_and_pull(stock, *args), run_and_pull(ours, *args)
    assert "esft_layout" in vars(ours) and "esft_layout" not in vars(stock)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    names = ["x", "weights", *(name for name, _ in ours.named_parameters())]
    assert [g is None for g in gradients] == [trains not in ("all", n) and n not in ("x", "weights") for n in names]
    for ours_, theirs in zip(gradients, wanted, strict=True):
        assert (ours_ is None) == (theirs is None)
        if ours_ is not None:
            assert (ours_ - theirs).abs().max() <= 2e-5 * theirs.abs().max()


@pytest.mark.parametrize("family", ["mixtral", "muse_spark"])
@pytest.mark.parametrize(("of_x", "of_weights"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_it_computes_in_the_dtype_of_the_weights_and_returns_that_of_the_input(family: str, of_x, of_weights):
    experts = experts_of(family).to(of_weights)
    x, index, weights = batch(experts, of_x)
    out = experts(x, index, weights)
    assert out.dtype == of_x
    assert torch.equal(out, experts(x.to(of_weights), index, weights).to(of_x))


@pytest.mark.parametrize("trains", [True, False])
def test_weights_that_do_not_train_lie_in_the_frozen_pool(monkeypatch, trains: bool):
    experts, seen, real = experts_of("gpt_oss").requires_grad_(False), [], interface.routed_mlp
    experts.down_proj_bias.requires_grad_(trains)  # one is enough

    def spy(x, index, weights, position, pools, **settings):
        seen.append((pools.num_trained, pools.num_experts, settings))
        return real(x, index, weights, position, pools, **settings)

    monkeypatch.setattr(interface, "routed_mlp", spy)
    experts(*batch(experts))
    experts._is_expert_parallel = True
    experts(*batch(experts))
    s = 8 if trains else 0
    assert seen == [(s, 8, {"elsewhere": False}), (s, 8, {"elsewhere": True})]


def test_without_expert_parallelism_ids_out_of_range_are_errors():
    experts = experts_of("mixtral")
    x, index, weights = batch(experts)
    with pytest.raises(ValueError, match="top_k_index"):
        experts(x, index + 1, weights)


def test_the_layout_is_read_once_and_an_error_names_the_class(monkeypatch):
    experts, seen, real = experts_of("mixtral"), [], interface.stock_layout.read_layout

    def spy(stock: nn.Module, name: str):
        seen.append((stock, name))
        return real(stock, name)

    monkeypatch.setattr(interface.stock_layout, "read_layout", spy)
    for _ in range(3):
        experts(*batch(experts))
    assert seen == [(experts, "MixtralExperts")]
    other = experts_of("mixtral")
    other.gate_up_proj = nn.Parameter(other.gate_up_proj[:, 1:])
    with pytest.raises(esft.InputError, match=r"^MixtralExperts\.gate_up_proj: has shape"):
        other(*batch(other))


def test_it_is_registered_as_esft():
    assert interface.NAME == "esft" and ALL_EXPERTS_FUNCTIONS["esft"] is interface.experts_forward


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "muse_spark"])
def test_slots_of_another_ranks_experts_add_nothing_and_get_no_gradient(family: str):
    model = zoo.tiny(family)
    model.set_experts_implementation("esft")
    experts = moe_layers(model)[0].experts
    experts._is_expert_parallel = True
    d = experts.down_proj.shape[2 if getattr(experts, "is_transposed", False) else 1]
    x, weights = torch.randn(5, d, requires_grad=True), torch.rand(5, 3, requires_grad=True)
    index = torch.tensor([[0, 3, 8], [8, 8, 8], [8, 1, 0], [2, 3, 4], [8, 0, 8]])
    here = index < 8
    out = experts(x, index, weights)
    out.sum().backward()
    # The same rows with the other rank's slots left out, one token at a time.
    for t in range(5):
        if not here[t].any():
            assert not out[t].count_nonzero()
            assert not x.grad[t].count_nonzero()
            continue
        alone = experts(x[t : t + 1].detach(), index[t : t + 1, here[t]], weights[t : t + 1, here[t]].detach())
        torch.testing.assert_close(out[t], alone[0], atol=1e-6, rtol=1e-5)
    assert not weights.grad[~here].count_nonzero()
    assert weights.grad[here].count_nonzero() == here.sum()


def test_inference_keeps_nothing_for_a_backward():
    model = zoo.tiny("mixtral")
    model.set_experts_implementation("esft")
    with torch.no_grad():
        out = model(input_ids=zoo.tokens()).logits
    assert not out.requires_grad
    model.requires_grad_(False)
    assert not model(input_ids=zoo.tokens()).logits.requires_grad

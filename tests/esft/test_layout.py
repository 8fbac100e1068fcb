import pytest
import torch
import torch.nn.functional as F
from esft.families import moe_layers
from esft.layout import read_layout
from esft.select import ExpertSelection
from torch import nn
from transformers.activations import ACT2FN

import esft
from esft_kernels.activation import Activation
from tests.esft import zoo
from tests.esft.models import tiny_model, token_batch


class Stacked(nn.Module):
    """Experts as a modelling file would have them, without transformers' decorator."""

    def __init__(self, act: str = "silu", up_scale: float = 1.0):
        super().__init__()
        self.num_experts, self.up_scale = 4, up_scale
        self.gate_up_proj = nn.Parameter(torch.randn(4, 12, 8))
        self.down_proj = nn.Parameter(torch.randn(4, 8, 6))
        self.act_fn = ACT2FN[act]

    def forward(self, hidden_states, top_k_index, top_k_weights):
        out = torch.zeros_like(hidden_states)
        for token, (ids, weights) in enumerate(zip(top_k_index, top_k_weights, strict=True)):
            for expert, weight in zip(ids, weights, strict=True):
                gate, up = F.linear(hidden_states[token], self.gate_up_proj[expert]).chunk(2)
                out[token] += weight * F.linear(self.act_fn(gate) * up * self.up_scale, self.down_proj[expert])
        return out


@pytest.mark.parametrize(
    ("act", "expected"),
    [
        ("silu", Activation()),
        ("gelu", Activation("gelu")),
        ("gelu_pytorch_tanh", Activation("gelu_tanh")),
        ("quick_gelu", Activation(slope=1.702)),
        ("relu2", Activation("relu2")),
        ("tanh", None),
        ("relu", None),
    ],
)
def test_the_activation_is_told_from_its_values(act: str, expected: Activation | None):
    assert read_layout(Stacked(act), "experts").activation == expected


def test_a_module_that_computes_something_else_than_its_layout_says_is_refused():
    with pytest.raises(esft.InputError, match="Stacked computes something else than stacked experts do"):
        read_layout(Stacked(up_scale=1.1), "experts")


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


def listed(model):
    """The model with every layer's experts as a ModuleList and a loop over it, as older code has them."""

    class Expert(nn.Module):
        def __init__(self, gate_up: torch.Tensor, down: torch.Tensor):
            super().__init__()
            (f2, d), f = gate_up.shape, down.shape[1]
            self.gate_proj, self.up_proj = nn.Linear(d, f2 // 2, bias=False), nn.Linear(d, f2 // 2, bias=False)
            self.down_proj = nn.Linear(f, d, bias=False)
            gate, up = gate_up.chunk(2)
            for linear, weight in ((self.gate_proj, gate), (self.up_proj, up), (self.down_proj, down)):
                linear.weight = nn.Parameter(weight.detach().clone())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))

    class Block(nn.Module):
        def __init__(self, block: nn.Module):
            super().__init__()
            self.gate, self.shared_experts = block.gate, block.shared_experts
            pairs = zip(block.experts.gate_up_proj, block.experts.down_proj, strict=True)
            self.experts = nn.ModuleList(Expert(gate_up, down) for gate_up, down in pairs)

        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            x = hidden_states.flatten(0, -2)
            _, weights, index = self.gate(hidden_states)
            out = self.shared_experts(x)
            for e, expert in enumerate(self.experts):
                token, slot = torch.where(index == e)
                out = out.index_add(0, token, expert(x[token]) * weights[token, slot, None].to(x.dtype))
            return out.view_as(hidden_states)

    for layer in moe_layers(model):
        parent = model.get_submodule(layer.name.rsplit(".", 2)[0])
        parent.mlp = Block(layer.block)
    return model


def test_a_module_list_trains_by_expert_and_its_adapter_fits_the_stacked_model(tmp_path):
    model, stacked = listed(tiny_model()), tiny_model()
    selection = ExpertSelection({1: [5, 2], 2: [0]})
    with pytest.warns(UserWarning, match="they are a ModuleList"):
        esft.swap(model, selection)
    esft.swap(stacked, selection)
    for m in (model, stacked):
        m(**token_batch()).logits.square().mean().backward()
    trained = [n for n, p in model.named_parameters() if p.grad is not None]
    assert len(trained) == 9
    ours = moe_layers(stacked)[0].experts.trained_down_proj.grad
    theirs = torch.stack([moe_layers(model)[0].experts[e].down_proj.weight.grad for e in (5, 2)])
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.5)
    esft.save_adapter(model, tmp_path / "a")
    esft.load_adapter(stacked, tmp_path / "a")
    torch.testing.assert_close(stacked(**token_batch()).logits, model(**token_batch()).logits, atol=2e-6, rtol=1e-5)
    esft.unswap(model)
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(esft.InputError, match="ModuleList hide which tokens they get"):
        esft.score_experts(model, [token_batch()])

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

import esft
from esft.experts.moe_layers import moe_layers
from esft.experts.plain_experts import PlainExperts
from esft.experts.pooled_experts import Experts
from esft.experts.stock_layout import is_stacked, read_layout, recognise
from esft.selection import ExpertSelection
from esft_kernels.activation import Activation
from tests.esft.models import tiny_model, token_batch


def same(value: Tensor) -> Tensor:
    return value


class Stacked(nn.Module):
    """Experts as a modelling file would have them, without transformers' decorator."""

    def __init__(self, act: str = "silu", up_scale: float = 1.0, spoil: Callable = same, num_experts: int = 4):
        super().__init__()
        self.num_experts, self.up_scale, self.spoil = num_experts, up_scale, spoil
        self.gate_up_proj = nn.Parameter(torch.randn(num_experts, 12, 8))
        self.down_proj = nn.Parameter(torch.randn(num_experts, 8, 6))
        self.act_fn = ACT2FN[act]

    def forward(self, hidden_states, top_k_index, top_k_weights):
        out = torch.zeros_like(hidden_states)
        for token, (ids, weights) in enumerate(zip(top_k_index, top_k_weights, strict=True)):
            for expert, weight in zip(ids, weights, strict=True):
                gate, up = F.linear(hidden_states[token], self.gate_up_proj[expert]).chunk(2)
                out[token] += weight * F.linear(self.act_fn(gate) * up * self.up_scale, self.down_proj[expert])
        return self.spoil(out)


E, D, F_ = 5, 4, 3


class Flagged(nn.Module):
    """Experts with transformers' flags; all sizes differ, so that no two can be mistaken for each other."""

    def __init__(self, gated=True, transposed=False, biased=False, interleaved=False):
        super().__init__()
        self.num_experts, self.has_gate, self.is_transposed, self.has_bias = E, gated, transposed, biased
        self.interleaved, self.up, g = interleaved, "gate_up_proj" if gated else "up_proj", 2 * F_ if gated else F_
        shapes = {self.up: (E, g, D), "down_proj": (E, D, F_), f"{self.up}_bias": (E, g), "down_proj_bias": (E, D)}
        for name, shape in list(shapes.items())[: 4 if biased else 2]:
            weight = torch.randn(shape, dtype=torch.float64)
            self.register_parameter(name, nn.Parameter(weight.mT if transposed and weight.dim() == 3 else weight))

    def act_fn(self, h):
        return F.silu(h)

    def _apply_gate(self, h):
        gate, up = (h[..., 0::2], h[..., 1::2]) if self.interleaved else h.chunk(2, dim=-1)
        return F.silu(gate) * up

    def matrices(self) -> list[Tensor]:
        """[E, G, D], [E, D, F] and the biases where there are some."""
        names = [self.up, "down_proj", *([f"{self.up}_bias", "down_proj_bias"] if self.has_bias else [])]
        weights = [getattr(self, name) for name in names]
        return [w.mT if self.is_transposed and w.dim() == 3 else w for w in weights]

    def forward(self, hidden_states, top_k_index, top_k_weights):
        up, down, *biases = self.matrices()
        up_bias, down_bias = biases or (torch.zeros(E, 1), torch.zeros(E, 1))
        out = torch.zeros_like(hidden_states)
        for t, (ids, weights) in enumerate(zip(top_k_index.tolist(), top_k_weights, strict=True)):
            for e, weight in zip(ids, weights, strict=True):
                h = up[e] @ hidden_states[t] + up_bias[e]
                a = self._apply_gate(h) if self.has_gate else self.act_fn(h)
                out[t] += weight * (down[e] @ a + down_bias[e])
        return out


LAYOUTS = [
    {"gated": gated, "transposed": transposed, "biased": biased, "interleaved": interleaved}
    for gated, interleaved in ((True, False), (True, True), (False, False))
    for transposed in (False, True)
    for biased in (False, True)
]


def batch() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(3, D).double(), torch.tensor([[0, 4], [2, 1], [3, 2]]), torch.rand(3, 2).double()


@pytest.mark.parametrize("flags", LAYOUTS)
def test_the_flags_are_read_and_our_experts_compute_what_the_stock_ones_do(flags: dict):
    stock, drawn = Flagged(**flags), torch.get_rng_state()
    stock.forward = None  # is not run: transformers' flags are taken at their word
    layout = read_layout(stock, "experts")
    del stock.forward
    assert torch.equal(torch.get_rng_state(), drawn)  # what a training draws does not hang on what was tried out
    up = "gate_up_proj" if flags["gated"] else "up_proj"
    names = (up, "down_proj", f"{up}_bias", "down_proj_bias")
    assert layout.names == names[: 4 if flags["biased"] else 2]
    assert (layout.transposed, layout.interleaved, layout.norm) == (flags["transposed"], flags["interleaved"], None)
    assert layout.activation == Activation(gated=flags["gated"]) and layout.is_fused
    weights = [t for t in layout.weights(stock).tensors() if t is not None]
    assert all(torch.equal(a, b) for a, b in zip(weights, stock.matrices(), strict=True))
    ours, args = layout.swapped(stock, [4, 1], "reference", "frozen"), batch()
    assert type(ours) is Experts and (ours.trained, ours.backend, ours.recompute) == ((4, 1), "reference", "frozen")
    torch.testing.assert_close(ours(*args), stock(*args), atol=1e-12, rtol=1e-12)
    kept = [w.detach().clone() for w in stock.parameters()]
    for parameter in ours.parameters():
        parameter.data.zero_()
    assert all(torch.equal(a, b) for a, b in zip(stock.parameters(), kept, strict=True))


@pytest.mark.parametrize("flags", LAYOUTS)
def test_an_activation_of_their_own_or_a_norm_goes_through_plain_pytorch(flags: dict):
    stock, args = Flagged(**flags), batch()
    expected = stock(*args)
    stock.has_post_expert_norm, stock.post_expert_norm = True, nn.LayerNorm(D, dtype=torch.float64)
    layout = read_layout(stock, "experts")
    assert layout.activation == Activation(gated=flags["gated"]) and not layout.is_fused
    assert layout.norm is stock.post_expert_norm
    ours = layout.swapped(stock, [4, 1], "reference", "frozen")
    assert type(ours) is PlainExperts and ours.post_expert_norm is stock.post_expert_norm
    assert (ours.trained, ours.backend, ours.recompute) == ((4, 1), "reference", "frozen")
    one, index = args[0][:1], args[1][:1, :1]
    alone = stock(one, index, torch.ones(1, 1).double())
    torch.testing.assert_close(ours(one, index, torch.full((1, 1), 0.3).double()), 0.3 * stock.post_expert_norm(alone))
    stock.has_post_expert_norm = False  # then whatever has that name is something else
    assert read_layout(stock, "experts").norm is None

    stock.act_fn, stock._apply_gate = (lambda h: h.tanh()), (lambda h: h[..., :F_].tanh() * h[..., F_:])
    layout = read_layout(stock, "experts")
    assert layout.activation is None and not layout.is_fused and layout.gate is not None
    ours = layout.swapped(stock, [2])
    assert type(ours) is PlainExperts and ours.post_expert_norm is None
    assert (ours.trained, ours.backend, ours.recompute) == ((2,), "auto", "none")
    torch.testing.assert_close(ours(*args), stock(*args), atol=1e-12, rtol=1e-12)
    assert not torch.allclose(stock(*args), expected)


def test_gated_experts_compute_their_gate_and_others_their_activation():
    stock = Flagged(gated=True)
    stock.act_fn = F.gelu
    assert read_layout(stock, "experts").activation == Activation()
    stock = Flagged(gated=False)
    stock._apply_gate = F.gelu
    assert read_layout(stock, "experts").activation == Activation(gated=False)


def test_without_a_gate_of_its_own_the_first_half_is_activated_whatever_the_number_of_dimensions():
    stock = Stacked("tanh")
    h = torch.randn(2, 3, 12)
    assert torch.equal(read_layout(stock, "experts").gate(h), h[..., :6].tanh() * h[..., 6:])


@pytest.mark.parametrize("flags", LAYOUTS)
def test_weights_of_other_shapes_than_the_flags_promise_are_refused_by_name(flags: dict):
    for name in read_layout(Flagged(**flags), "experts").names:
        if name == "down_proj":
            continue
        stock = Flagged(**flags)
        good = tuple(getattr(stock, name).shape)
        for dim in range(len(good)):
            bad = (*good[:dim], good[dim] + 1, *good[dim + 1 :])
            setattr(stock, name, nn.Parameter(torch.zeros(bad)))
            with pytest.raises(esft.InputError) as raised:
                read_layout(stock, "layers.3.experts")
            assert str(raised.value).startswith(f"layers.3.experts.{name}: has shape {bad}, not {good} as down_proj")


def test_gated_experts_are_not_taken_for_others_and_the_other_way_round():
    stock = Flagged(gated=True)
    stock.has_gate = False
    with pytest.raises(esft.InputError, match="experts.up_proj: experts of NoneType are not supported"):
        read_layout(stock, "experts")
    stock = Flagged(gated=False)
    stock.gate_up_proj = stock.up_proj
    del stock.has_gate  # a gate_up_proj says so then
    with pytest.raises(esft.InputError, match=r"gate_up_proj: has shape \(5, 3, 4\), not \(5, 6, 4\)"):
        read_layout(stock, "experts")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_of_two_bytes_and_more_are_read(dtype: torch.dtype):
    assert read_layout(Flagged().to(dtype), "experts").activation == Activation()
    assert read_layout(Stacked().to(dtype), "experts").activation == Activation()


@pytest.mark.parametrize("name", ["gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias"])
@pytest.mark.parametrize(
    ("spoil", "kind"),
    [
        (lambda w: w.to(torch.float8_e4m3fn), "torch.float8_e4m3fn"),
        (lambda w: w.to(torch.int32), "torch.int32"),
        (lambda w: [w], "list"),
        (lambda w: None, "NoneType"),
    ],
)
def test_weights_that_are_no_floats_are_refused_by_name(name: str, spoil: Callable, kind: str):
    stock = Flagged(biased=True)
    weight = getattr(stock, name).detach()
    delattr(stock, name)
    setattr(stock, name, spoil(weight))
    with pytest.raises(esft.InputError, match=rf"^layers\.3\.experts\.{name}: experts of {kind} are not supported"):
        read_layout(stock, "layers.3.experts")


@pytest.mark.parametrize("gated", [True, False])
def test_experts_whose_activation_is_not_to_be_found_are_refused(gated: bool):
    stock = nn.Module()
    stock.num_experts, stock.is_transposed, stock.has_gate = E, False, gated
    up = torch.zeros(E, 2 * F_ if gated else F_, D)
    stock.register_parameter("gate_up_proj" if gated else "up_proj", nn.Parameter(up))
    stock.down_proj = nn.Parameter(torch.zeros(E, D, F_))
    with pytest.raises(esft.InputError, match=r"^experts: what these experts compute .* is not known"):
        read_layout(stock, "experts")


class Three(nn.Module):
    def forward(self, hidden_states, top_k_index, top_k_weights): ...


class Two(nn.Module):
    def forward(self, hidden_states, routing): ...


@pytest.mark.parametrize(
    ("cls", "attributes", "expected"),
    [
        (Three, "num_experts down_proj gate_up_proj", True),
        (Three, "num_experts down_proj up_proj", True),
        (Three, "num_experts down_proj has_gate", True),
        (Three, "num_experts down_proj", False),
        (Three, "num_experts gate_up_proj", False),
        (Three, "down_proj gate_up_proj", False),
        (Two, "num_experts down_proj gate_up_proj", False),
        (Two, "num_experts down_proj gate_up_proj is_transposed", True),
        (Two, "num_experts down_proj is_transposed", False),
    ],
)
def test_stacked_experts_are_told_by_their_parameters_and_their_seam(cls, attributes: str, expected: bool):
    module = cls()
    for name in attributes.split():
        setattr(module, name, 1)
    assert is_stacked(module) is expected


def test_a_module_that_says_it_has_no_gate_needs_up_projections():
    module = Three()
    module.num_experts, module.down_proj, module.gate_up_proj, module.has_gate = 4, 1, 1, False
    assert is_stacked(module) is False
    module.up_proj = 1
    assert is_stacked(module)


def silu(z: Tensor, slope: float = 1.0) -> Tensor:
    return z / (1 + (-slope * z).exp())


FORMULAS = {
    Activation(): silu,
    Activation("gelu"): lambda z: z * (1 + torch.erf(z / 2**0.5)) / 2,
    Activation("gelu_tanh"): lambda z: z * (1 + (math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)).tanh()) / 2,
    Activation("relu2"): lambda z: z.clamp(min=0) ** 2,
    Activation(slope=1.702): lambda z: silu(z, 1.702),
}


def halves(f: Callable, up: Callable = same, gate: Callable = same) -> Callable:
    """A gate function of all gates before all ups."""
    return lambda h: f(gate(h[:, : h.shape[1] // 2])) * up(h[:, h.shape[1] // 2 :])


def holding(**numbers) -> nn.Module:
    module = nn.Module()
    for name, number in numbers.items():
        setattr(module, name, number)
    return module


@pytest.mark.parametrize("activation", FORMULAS, ids=str)
def test_every_activation_is_recognised_gated_interleaved_and_alone(activation: Activation):
    f, settings = FORMULAS[activation], {"kind": activation.kind, "slope": activation.slope}
    assert recognise(halves(f), True, nn.Module()) == (activation, False)
    assert recognise(lambda h: f(h[:, 0::2]) * h[:, 1::2], True, nn.Module()) == (activation, True)
    assert recognise(halves(f, lambda up: up + 1), True, nn.Module()) == (Activation(**settings, up_offset=1.0), False)
    assert recognise(f, False, nn.Module()) == (Activation(**settings, gated=False), False)
    limited = halves(f, lambda up: up.clamp(-6, 6), lambda gate: gate.clamp(max=6))
    assert recognise(limited, True, holding(other=2, limit=6)) == (Activation(**settings, limit=6.0), False)
    assert recognise(limited, True, holding(other=2)) is None


def below(limit: float) -> Callable:
    return halves(silu, lambda up: up.clamp(-limit, limit), lambda gate: gate.clamp(max=limit))


RECOGNISED = {
    "a slope that the module holds": (halves(lambda z: silu(z, 3)), True, {"alpha": 3}, Activation(slope=3.0)),
    "the same alone": (lambda h: silu(h, 3), False, {"alpha": 3}, Activation(gated=False, slope=3.0)),
    "slope and limit": (
        halves(lambda z: silu(z, 0.5), lambda up: up.clamp(-4, 4) + 1, lambda gate: gate.clamp(max=4)),
        True, {"a": 4.0, "b": 0.5}, Activation(slope=0.5, limit=4.0, up_offset=1.0),
    ),
    "a high limit": (below(5000.0), True, {"limit": 5000}, Activation(limit=5000.0)),
    "a limit that is never reached": (halves(silu), True, {"size": 10**9}, Activation()),
    "rounded as float32 does": (lambda h: halves(silu)(h.float()), True, {}, Activation()),
    "off by less than rounding": (lambda h: halves(silu)(h) * (1 + 1e-6) + 1e-7, True, {}, Activation()),
    "a slope not held": (halves(lambda z: silu(z, 3)), True, {}, None),
    "a limit of which the module says only true": (below(1.0), True, {"gated": True}, None),
    "a limit as text": (below(6.0), True, {"limit": "6"}, None),
    "a high limit not held": (below(5000.0), True, {}, None),
    "both sides of the gate": (halves(silu, same, lambda gate: gate.clamp(-6, 6)), True, {"limit": 6}, None),
    "an infinite slope": (lambda h: h.relu(), False, {"most": math.inf}, None),
    "numbers that cannot be limits": (halves(torch.tanh), True, {"a": 0, "b": -1.5, "c": math.nan}, None),
    "another offset": (halves(silu, lambda up: up + 0.5), True, {}, None),
    "another factor": (lambda h: halves(silu)(h) * (1 + 5e-5), True, {}, None),
    "something added": (lambda h: halves(silu)(h) + 2e-5, True, {}, None),
    "fewer columns": (lambda h: halves(silu)(h)[:, :4], True, {}, None),
    "ups first": (lambda h: h[:, :8] * silu(h[:, 8:]), True, {}, None),
}  # fmt: skip


@pytest.mark.parametrize("case", RECOGNISED)
def test_a_gate_is_recognised_only_where_all_its_values_are_the_kernels(case: str):
    gate, gated, held, expected = RECOGNISED[case]
    found = recognise(gate, gated, holding(**held))
    assert found == (None if expected is None else (expected, False))
    if found is not None:  # what goes to compiled kernels must be floats
        assert type(found[0].slope) is float and type(found[0].limit) in (float, type(None))


def test_a_gate_that_writes_into_its_input_is_compared_with_the_values_that_it_got():
    assert recognise(lambda h: (halves(silu)(h), h.zero_())[0], True, nn.Module()) == (Activation(), False)


@pytest.mark.parametrize("error", [RuntimeError, TypeError, ValueError, AttributeError])
def test_functions_that_cannot_be_tried_are_not_recognised_and_experts_that_cannot_are_refused(error: type):
    def fails(_: Tensor) -> Tensor:
        raise error("more is needed")

    assert recognise(fails, True, nn.Module()) is None
    with pytest.raises(esft.InputError, match="Stacked computes something else"):
        read_layout(Stacked(spoil=fails), "experts")
    flagged = Flagged()
    flagged.forward = fails  # transformers' flags are believed
    assert read_layout(flagged, "experts").activation == Activation()


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


def with_the_first_expert_only(stock: Stacked) -> Stacked:
    forward = stock.forward
    stock.forward = lambda x, index, weights: forward(x, torch.zeros_like(index), weights)
    return stock


def scaled(stock: Stacked, factor: float) -> Stacked:
    """With weights, and so outputs, that are small."""
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.mul_(factor)
    return stock


def without_routing_weights(stock: Stacked) -> Stacked:
    forward = stock.forward
    stock.forward = lambda x, index, weights: forward(x, index, torch.ones_like(weights))
    return stock


@pytest.mark.parametrize(
    "stock",
    [
        lambda: Stacked(up_scale=1.1),
        lambda: Stacked(up_scale=1 + 2e-5),
        lambda: scaled(Stacked(up_scale=1.1), 1e-3),
        lambda: Stacked(spoil=lambda out: out - 0.01),
        lambda: Stacked(spoil=lambda out: out + 0.01),
        lambda: with_the_first_expert_only(Stacked()),
        lambda: without_routing_weights(Stacked()),
    ],
)
def test_a_module_that_computes_something_else_than_its_layout_says_is_refused(stock: Callable):
    with pytest.raises(esft.InputError, match="^experts: Stacked computes something else than stacked experts do"):
        read_layout(stock(), "experts")


def all_negative() -> Stacked:
    """Experts whose outputs are all below zero: relu(g)^2 * g is never negative, and the down projections are."""
    stock = Stacked("relu2")
    with torch.no_grad():
        stock.gate_up_proj[:, 6:] = stock.gate_up_proj[:, :6]
        stock.down_proj.abs_().neg_()
    return stock


@pytest.mark.parametrize(
    "stock",
    [
        Stacked,
        all_negative,
        lambda: Stacked(up_scale=1 + 1e-6),
        lambda: Stacked(num_experts=1),
        lambda: Stacked().to("meta"),
        lambda: Stacked(up_scale=1.1).to("meta"),  # cannot be tried, and is not
    ],
)
def test_a_module_that_computes_what_its_layout_says_up_to_rounding_is_read(stock: Callable):
    found, drawn = stock(), torch.get_rng_state()
    assert read_layout(found, "x").names == ("gate_up_proj", "down_proj") and torch.equal(torch.get_rng_state(), drawn)


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

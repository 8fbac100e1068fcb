"""What is read off routers: tried on routers whose outputs are made up, so that every case is one of a known answer."""

import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import esft
from esft.experts.moe_layers import GATE, moe_layers
from esft.scoring.routers import GATES, Choice, gate_of, watch_routers
from tests.esft.models import tiny_model, token_batch

FUNCTIONS = {
    "softmax": lambda z: z.exp() / z.exp().sum(dim=1, keepdim=True),
    "sigmoid": lambda z: 1 / (1 + (-z).exp()),
    "sqrtsoftplus": lambda z: (1 + z.exp()).log() ** 0.5,
    "probabilities": lambda z: z,
}
# What routers do to the chosen gate values afterwards.
AFTER = {
    "as they are": lambda g: g,
    "renormalised": lambda g: g / g.sum(dim=1, keepdim=True),
    "scaled": lambda g: 16 * g,
}


def logits_and_index(name: str, tokens: int = 12, top_k: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    logits = torch.randn(tokens, 8)
    if name == "probabilities":
        logits = FUNCTIONS["softmax"](logits)
    return logits, torch.rand(tokens, 8).topk(top_k).indices


def chosen(name: str, logits: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return FUNCTIONS[name](logits.float()).gather(1, index)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gate_functions_compute_what_they_are_called(name: str):
    logits = torch.randn(5, 7).abs()
    torch.testing.assert_close(GATES[name](logits), FUNCTIONS[name](logits))
    assert GATES.keys() == FUNCTIONS.keys()


@pytest.mark.parametrize("top_k", [2, 8])
@pytest.mark.parametrize("after", AFTER)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_gate_function_is_told_from_the_weights(name: str, after: str, top_k: int):
    logits, index = logits_and_index(name, top_k=top_k)
    assert gate_of(logits, index, AFTER[after](chosen(name, logits, index))) == name


def test_a_softmax_over_the_chosen_logits_alone_is_a_softmax():
    logits, index = logits_and_index("softmax")
    assert gate_of(logits, index, logits.gather(1, index).softmax(dim=-1)) == "softmax"


def test_one_choice_a_token_tells_nothing():
    logits, index = logits_and_index("softmax", top_k=1)
    assert gate_of(logits, index, chosen("softmax", logits, index)) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("of", ["logits", "weights"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_router_in_16_bits_is_recognised(name: str, of: str, dtype: torch.dtype):
    logits, index = logits_and_index(name)
    weights = AFTER["renormalised"](chosen(name, logits, index))
    pair = (logits.to(dtype), weights) if of == "logits" else (logits, weights.to(dtype))
    exact = gate_of(pair[0].float(), index, pair[1].float())
    assert exact is None  # as float32, that is too far from any
    assert gate_of(pair[0], index, pair[1]) == name


@pytest.mark.parametrize("name", ["softmax", "sigmoid", "sqrtsoftplus"])
def test_logits_of_16_bits_are_computed_with_in_32(name: str):
    # Logits so small and alike that the functions' values all round to the same in 16 bits.
    logits = (torch.randn(12, 8) * 0.01).bfloat16()
    index = torch.rand(12, 8).topk(3).indices
    assert gate_of(logits, index, chosen(name, logits, index)) == name


def test_weights_whose_sum_their_dtype_cannot_hold_are_recognised():
    logits, index = logits_and_index("sigmoid")
    weights = (AFTER["renormalised"](chosen("sigmoid", logits, index)) * 90_000).half()
    assert weights.isfinite().all() and weights.sum(dim=1).isinf().all()
    assert gate_of(logits, index, weights) == "sigmoid"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "strange",
    [
        lambda logits, index: chosen("softmax", logits, index) ** 2,
        lambda logits, index: chosen("softmax", logits, index).flip(1),
        lambda logits, index: torch.full(index.shape, 0.3) + torch.arange(3) / 5,
        lambda logits, index: chosen("sigmoid", logits, index) * torch.tensor([1.0, 2.0, 3.0]),
    ],
    ids=["squared", "in another order", "constant", "scaled by expert"],
)
def test_weights_that_fit_no_gate_function_tell_none(strange, dtype: torch.dtype):
    logits, index = logits_and_index("softmax")
    assert gate_of(logits.to(dtype), index, strange(logits, index).to(dtype)) is None


@pytest.mark.parametrize(("dtype", "slight", "much"), [(torch.float32, 1e-7, 1e-5), (torch.bfloat16, 2e-2, 0.2)])
def test_one_token_that_is_off_by_more_than_rounding_is_enough_to_tell_none(dtype, slight: float, much: float):
    logits, index = logits_and_index("softmax", tokens=100)
    weights = AFTER["renormalised"](chosen("softmax", logits, index))
    for off, expected in ((slight, "softmax"), (much, None)):
        other = weights.clone()
        other[-1] += torch.tensor([off, -off, 0.0])
        assert gate_of(logits.to(dtype), index, other.to(dtype)) == expected


class Experts(nn.Module):
    """Stacked experts that give back what they get."""

    def __init__(self, num_experts: int):
        super().__init__()
        self.num_experts = num_experts
        self.gate_up_proj = nn.Parameter(torch.zeros(num_experts, 2, 1))
        self.down_proj = nn.Parameter(torch.zeros(num_experts, 1, 1))

    def forward(self, hidden_states, top_k_index, top_k_weights):
        return hidden_states


class Router(nn.Module):
    """Says what it is told to."""

    says: object

    def forward(self, x):
        return self.says


class Block(nn.Module):
    def __init__(self, num_experts: int):
        super().__init__()
        self.gate, self.experts, self.by_name = Router(), Experts(num_experts), False

    def forward(self, x):
        self.gate(x)
        if self.by_name:
            return self.experts(x, top_k_index=self.index, top_k_weights=self.weights)
        return self.experts(x, self.index, self.weights)


class Model(nn.Module):
    """Layers 0, 1, ... whose routers decide what ``decide`` says."""

    def __init__(self, layers: int = 1, num_experts: int = 4, model_type: str = "made_up"):
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"mlp": Block(num_experts)}) for _ in range(layers))
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(model_type=model_type))

    def decide(self, says, index: torch.Tensor, weights: torch.Tensor, layer: int = 0) -> "Model":
        block = self.layers[layer]["mlp"]
        block.gate.says, block.index, block.weights = says, index, weights
        return self

    def forward(self):
        for layer in self.layers:
            layer["mlp"](torch.arange(len(layer["mlp"].index))[:, None])


def watched(model: Model, keep: torch.Tensor) -> list[tuple[int, Choice]]:
    found = []
    with (
        warnings.catch_warnings(),
        watch_routers(model, keep, lambda layer, choice: found.append((layer.index, choice))),
    ):
        warnings.simplefilter("error")
        model()
    return found


ALL = torch.ones(5, dtype=torch.bool)
INDEX = torch.tensor([[0, 1], [2, 3], [3, 0], [1, 2], [3, 1]])


def sigmoid_weights(logits: torch.Tensor, index: torch.Tensor = INDEX) -> torch.Tensor:
    return logits.detach().sigmoid().gather(1, index)


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize(
    "says",
    [
        lambda logits, weights: logits,
        lambda logits, weights: (logits, weights, INDEX),
        lambda logits, weights: (INDEX, weights, logits),
        lambda logits, weights: (torch.zeros(5, 4, dtype=torch.long), weights, logits),
        lambda logits, weights: (logits, weights, torch.randn(5, 4)),
        lambda logits, weights: logits.view(5, 1, 4),
    ],
    ids=["alone", "first", "last", "after whole numbers", "first of two", "by sequence"],
)
def test_the_logits_are_found_wherever_the_router_has_them(says, by_name: bool):
    logits = torch.randn(5, 4)
    weights = sigmoid_weights(logits)
    model = Model().decide(says(logits, weights), INDEX, weights)
    model.layers[0]["mlp"].by_name = by_name
    ((index, choice),) = watched(model, ALL)
    assert index == 0
    assert torch.equal(choice.index_TK, INDEX)
    torch.testing.assert_close(choice.gates_TE, FUNCTIONS["sigmoid"](logits))
    assert choice.taken_TK.dtype == torch.bool and choice.taken_TK.all()


def test_gate_values_are_float32_and_send_gradients_to_the_logits():
    logits = torch.randn(5, 4).bfloat16().requires_grad_()
    model = Model().decide(logits, INDEX, logits.float().sigmoid().gather(1, INDEX))  # whose graph is left alone
    ((_, choice),) = watched(model, ALL)
    assert choice.gates_TE.dtype == torch.float32
    choice.gates_TE.sum().backward()
    expected = logits.detach().float().sigmoid()
    torch.testing.assert_close(logits.grad.float(), expected * (1 - expected), rtol=1e-2, atol=1e-3)


def test_a_router_may_have_more_logits_than_there_are_experts_and_empty_slots_are_not_taken():
    logits = torch.randn(5, 6)  # two more, to choose no expert
    weights = sigmoid_weights(logits)
    index = INDEX.clone()
    index[1, 0] = index[4, 1] = 0
    weights[1, 0] = weights[4, 1] = 0.0
    # Weights of empty slots are in proportion to nothing, so that only what is known of the family tells the function.
    model = Model(model_type="zaya").decide(logits, index, weights)
    ((_, choice),) = watched(model, ALL)
    assert choice.taken_TK.tolist() == [[True, True], [False, True], [True, True], [True, True], [True, False]]
    assert choice.gates_TE.shape == (5, 6)


def test_tokens_that_do_not_count_are_left_out_of_everything():
    logits = torch.randn(5, 4)
    weights = sigmoid_weights(logits)
    weights[1] = torch.tensor([5.0, 0.01])  # what padding gets fits nothing, and must not matter
    keep = torch.tensor([True, False, True, True, False])
    ((_, choice),) = watched(Model().decide(logits, INDEX, weights), keep)
    assert torch.equal(choice.index_TK, INDEX[[0, 2, 3]])
    assert choice.taken_TK.shape == (3, 2)
    torch.testing.assert_close(choice.gates_TE, logits.sigmoid()[[0, 2, 3]])
    assert torch.equal(choice.weights_TK, weights[[0, 2, 3]]) and choice.x_TD.tolist() == [[0], [2], [3]]


def test_a_pass_without_a_token_that_counts_is_not_reported():
    logits = torch.randn(5, 4)
    assert watched(Model().decide(logits, INDEX, sigmoid_weights(logits)), ~ALL) == []


def test_every_layer_and_pass_inside_the_block_is_reported_in_turn_and_none_after_it():
    model, logits = Model(layers=2), torch.randn(2, 5, 4)
    for layer in range(2):
        model.decide(logits[layer], INDEX, sigmoid_weights(logits[layer]), layer)
    found = []
    with watch_routers(model, ALL, lambda layer, choice: found.append((layer.name, choice.gates_TE))):
        model()
        model()
    model()
    assert [name for name, _ in found] == ["layers.0.mlp.experts", "layers.1.mlp.experts"] * 2
    for (_, gates), expected in zip(found, [*logits, *logits], strict=True):
        torch.testing.assert_close(gates, expected.sigmoid())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_one_expert_a_token_has_no_gate_values_unless_the_family_is_known():
    logits = torch.randn(5, 4)
    index, weights = INDEX[:, :1], torch.ones(5, 1)
    ((_, choice),) = watched(Model().decide(logits, index, weights), ALL)
    assert choice.gates_TE is None and choice.taken_TK.all() and torch.equal(choice.index_TK, index)
    ((_, choice),) = watched(Model(model_type="zaya").decide(logits, index, weights), ALL)
    torch.testing.assert_close(choice.gates_TE, FUNCTIONS["softmax"](logits))


@pytest.mark.parametrize("family", GATE)
def test_what_is_known_of_a_family_goes_before_what_the_weights_say(family: str):
    logits = torch.randn(5, 4)
    ((_, choice),) = watched(Model(model_type=family).decide(logits, INDEX, sigmoid_weights(logits)), ALL)
    torch.testing.assert_close(choice.gates_TE, FUNCTIONS[GATE[family]](logits))


def test_weights_that_fit_no_gate_function_are_refused_with_the_layer():
    model, logits = Model(layers=2), torch.randn(5, 4)
    model.decide(logits, INDEX, sigmoid_weights(logits), 0)
    model.decide(logits, INDEX, sigmoid_weights(logits) ** 3, 1)
    every = "softmax, sigmoid, sqrtsoftplus, probabilities"
    with pytest.raises(esft.InputError, match=f"^layers.1.mlp.experts: the router makes of its logits none of {every}"):
        watched(model, ALL)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_gate_values_of_a_router_that_decides_by_what_is_no_number_are_none():
    logits = torch.randn(5, 4)
    model = Model().decide(logits * torch.nan, INDEX, sigmoid_weights(logits) * torch.nan)
    ((_, choice),) = watched(model, ALL)
    assert choice.gates_TE.shape == (5, 4) and bool(choice.gates_TE.isnan().all())


def test_experts_that_get_other_tokens_than_the_batch_has_are_refused():
    logits = torch.randn(4, 4)
    model = Model().decide(logits, INDEX[:4], sigmoid_weights(logits, INDEX[:4]))
    with pytest.raises(esft.InputError, match="^layers.0.mlp.experts: gets 4 of 5 tokens, so they cannot be scored"):
        watched(model, ALL)


@pytest.mark.parametrize("says", [(INDEX, torch.rand(5, 2)), torch.zeros(5, 4, dtype=torch.long), torch.rand(5, 3)])
def test_a_router_that_gives_no_logits_is_refused(says):
    model = Model().decide(says, INDEX, torch.rand(5, 2))
    with pytest.raises(esft.InputError, match="^layers.0.mlp.experts: the router gives no logits"):
        watched(model, ALL)


def test_logits_of_an_earlier_pass_do_not_stand_for_missing_ones():
    logits = torch.randn(5, 4)
    model = Model().decide(logits, INDEX, sigmoid_weights(logits))
    with watch_routers(model, ALL, lambda *_: None):
        model()
        model.decide(INDEX, INDEX, sigmoid_weights(logits))
        with pytest.raises(esft.InputError, match="the router gives no logits"):
            model()


def test_a_layer_without_a_router_is_refused_and_leaves_no_hook_on_the_others():
    model = Model(layers=2)
    del model.layers[1]["mlp"].gate
    with pytest.raises(esft.InputError, match="layer 1: no router"), watch_routers(model, ALL, lambda *_: None):
        pass
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_experts_in_a_module_list_are_refused_with_the_first_layer_that_has_them():
    model = Model(layers=3)
    for layer in (1, 2):
        model.layers[layer]["mlp"].experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(4))
    refused = pytest.raises(esft.InputError, match="^layers.1.mlp.experts: experts in a ModuleList hide which tokens")
    with refused, watch_routers(model, ALL, lambda *_: None):
        pass


def test_a_models_routers_are_watched_as_they_decide():
    model, batch = tiny_model("deepseek_v3"), token_batch()
    seen, found = [], []
    for layer in moe_layers(model):
        layer.router.register_forward_hook(lambda _, __, out: seen.append(out))
    keep = batch["attention_mask"].flatten().bool()
    with torch.no_grad(), watch_routers(model, keep, lambda layer, choice: found.append((layer.index, choice))):
        model(**batch)
    assert [index for index, _ in found] == [1, 2]
    for (_, choice), (logits, _, index) in zip(found, seen, strict=True):
        assert torch.equal(choice.index_TK, index[keep])
        torch.testing.assert_close(choice.gates_TE, F.sigmoid(logits[keep].float()))

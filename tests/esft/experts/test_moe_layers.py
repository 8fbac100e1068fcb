"""Every family that transformers gives the experts interface: swapped, it computes what the stock model does."""

import re
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import esft
from esft.data.examples import IGNORE
from esft.errors import RankError
from esft.evaluation.loss import batch_loss
from esft.experts.moe_layers import (
    MoELayer,
    dealt_parameters,
    dealt_pools,
    is_apart,
    is_dealt,
    moe_layers,
    ranks_of,
    stock_weights,
)
from esft.experts.plain_experts import PlainExperts
from esft.experts.pooled_experts import PROJECTIONS, Experts
from esft.experts.stock_layout import read_layout
from esft.parallel.experts import Deal
from esft.parallel.ranks import ALONE, Ranks
from esft.selection import ExpertSelection
from tests.esft import zoo
from tests.esft.experts.test_stock_layout import listed
from tests.esft.models import tiny_model
from tests.esft.parallel.jobs import FirstOfTwo

# Families that cannot be built and run here, with the reason; none of them may be runnable.
UNBUILDABLE = {
    "qwen3_omni_moe:Qwen3OmniMoeTalkerTextExperts": "its forward looks for embed_tokens, which the model does not have",
}
FAMILIES = sorted(set(zoo.families()) - set(UNBUILDABLE))
# What the kernels cannot fuse: an activation of two arguments, a norm after each expert.
PLAIN = {"inkling2", "muse_spark"}
# What routers apply to their logits, as their code says; all others a softmax.
SIGMOID = """afmoe axk1 axk2 bailing_hybrid beam deepseek_v3 deepseek_v32 dots1 dots3_note exaone_moe flint glm4_moe
glm4_moe_lite glm4v_moe glm5_next glm_moe_dsa hy_v3 hy_v4 inkling inkling2 kimi_linear kolibri1 laguna lfm2_moe
mimo_v2_flash minimax_m2 minimax_m3_vl muse_spark nemotron_h solar_open""".split()


def output(model) -> torch.Tensor:
    """Logits, or the last hidden states of a model without a head."""
    out = model(input_ids=zoo.tokens(), use_cache=False)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


def backward(out: torch.Tensor) -> None:
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(2))).mean().backward()


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((found - expected).abs().max() <= 2e-5 * expected.abs().max())


def selection(model) -> ExpertSelection:
    """Three experts of the first MoE layer, one of the last, none of any other."""
    layers = moe_layers(model)
    return ExpertSelection({layers[0].index: [5, 0, 2], layers[-1].index: [1]})


def with_all_else(model) -> ExpertSelection:
    """The same experts, the shared ones where there are any, and everything that is no expert."""
    shared = any(layer.shared_experts for layer in moe_layers(model))
    return ExpertSelection(selection(model).experts, shared, non_expert_modules=True)


def swapped(model, chosen: ExpertSelection, backend: str = "auto"):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return esft.swap(model, chosen, backend)


def tune(model) -> None:
    """Move everything that trains."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)


def names_of(layer: MoELayer) -> tuple[str, ...]:
    return read_layout(layer.experts, layer.name).names


class Stacked(nn.Module):
    """As little as makes stacked experts."""

    def __init__(self, num_experts: int = 4):
        super().__init__()
        self.num_experts = num_experts
        self.gate_up_proj, self.down_proj = nn.Parameter(torch.zeros(4, 4, 2)), nn.Parameter(torch.zeros(4, 2, 2))

    def forward(self, hidden_states, top_k_index, top_k_weights): ...


def tree(**modules: nn.Module) -> nn.Module:
    """A model with these modules; in their paths a double underscore stands for the dot."""
    model = nn.Module()
    for path, module in modules.items():
        *above, last = path.removeprefix("_").split("__")
        at = model
        for name in above:
            if not hasattr(at, name):
                at.add_module(name, nn.Module())
            at = getattr(at, name)
        at.add_module(last, module)
    return model


def ours(cls: type[Experts] = Experts, trained: tuple[int, ...] = (2,), **more) -> Experts:
    return cls(torch.zeros(4, 4, 2), torch.zeros(4, 2, 2), trained, **more)


def linears(*sizes: int) -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(size, 3) for size in sizes)


def found(**modules: nn.Module) -> list[tuple[int, str]]:
    return [(layer.index, layer.name) for layer in moe_layers(tree(**modules))]


def test_layers_come_by_their_number_with_block_and_parent():
    model = tree(model__layers__10__mlp__experts=Stacked(8), model__layers__2__mlp__pool=ours())
    low, high = moe_layers(model)
    assert (low.index, low.name, low.attribute, low.num_experts) == (2, "model.layers.2.mlp.pool", "pool", 4)
    assert (high.index, high.name, high.attribute, high.num_experts) == (
        10, "model.layers.10.mlp.experts", "experts", 8
    )  # fmt: skip
    for layer, path in ((low, "model.layers.2"), (high, "model.layers.10")):
        assert layer.parent is model.get_submodule(path) and layer.block is layer.parent.mlp
        assert layer.experts is model.get_submodule(layer.name)


def test_the_first_number_of_a_path_counts_and_only_one_with_something_below_it():
    assert found(model__layers__3__parts__1__experts=Stacked()) == [(3, "model.layers.3.parts.1.experts")]
    (layer,) = moe_layers(model := tree(_5__experts=Stacked()))
    assert (layer.index, layer.name) == (5, "5.experts")
    assert layer.block is getattr(model, "5") and layer.parent is model
    for path in ("model__layer5__experts", "model__experts__7", "experts"):
        with pytest.raises(esft.InputError, match="^Module has no MoE layers with stacked experts"):
            moe_layers(tree(**{path: Stacked()}))


def test_layers_that_share_a_number_are_all_numbered_by_their_place():
    assert found(text__layers__4__experts=Stacked(), images__layers__4__experts=Stacked(), more__2__experts=ours()) == [
        (0, "text.layers.4.experts"), (1, "images.layers.4.experts"), (2, "more.2.experts")
    ]  # fmt: skip
    assert [index for index, _ in found(a__1__text=Stacked(), a__1__image=Stacked(), a__0__text=Stacked())] == [0, 1, 2]


def test_a_list_of_experts_of_one_shape_is_a_layer():
    (layer,) = moe_layers(tree(layers__1__experts=linears(3, 3), layers__0__experts=linears(3)))
    assert (layer.index, layer.num_experts, layer.attribute) == (1, 2, "experts")
    named = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
    named[1].register_parameter("scale", nn.Parameter(torch.zeros(1)))
    others = {
        "layers__2__blocks": linears(3, 3),  # another name
        "layers__2__my_experts": linears(3, 3),
        "layers__3__experts": linears(3, 3, 4),  # another shape
        "layers__4__experts": nn.ModuleList([nn.SiLU(), nn.SiLU()]),  # nothing to train
        "layers__5__experts": named,
        "layers__6__experts": nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)),
        "layers__7__experts": nn.ModuleList(),
    }
    assert found(layers__1__experts=linears(3, 3), **others) == [(1, "layers.1.experts")]


def layer_with(block: dict, parent: dict | None = None) -> MoELayer:
    model = tree(model__layers__3__mlp__experts=Stacked())
    layer = moe_layers(model)[0]
    for holder, attributes in ((layer.block, block), (layer.parent, parent or {})):
        for name, value in attributes.items():
            setattr(holder, name, value)
    return layer


def test_the_router_is_the_modules_first_that_has_one_of_its_names():
    modules = {name: nn.Linear(2, 4) for name in ("moe_gate", "wg", "router", "gate")}
    for name in ("gate", "router", "wg", "moe_gate"):
        assert layer_with(modules).router is modules.pop(name)
    router = nn.Linear(2, 4)
    assert layer_with({"gate": "softmax", "router": router}).router is router
    with pytest.raises(esft.InputError, match=r"^layer 3: no router beside model\.layers\.3\.mlp\.experts"):
        _ = layer_with({"gate": None}, {"router": router}).router


def test_shared_experts_are_those_of_the_block_and_of_its_parent():
    names = ("shared_experts", "shared_expert", "shared_expert_gate", "shared_mlp", "share_expert")
    block, parent = ({name: nn.Linear(2, 2) for name in reversed(names)} for _ in range(2))
    expected = [block[name] for name in names] + [parent[name] for name in names]
    assert all(a is b for a, b in zip(layer_with(block, parent).shared_experts, expected, strict=True))
    assert layer_with({"shared_experts": None, "shared_mlp": 2}).shared_experts == []


def names_in(layer: MoELayer, parameters: list[nn.Parameter]) -> list[str]:
    names = {id(p): name for name, p in layer.experts.named_parameters()}
    return [names[id(p)] for p in parameters]


def test_parameters_are_told_apart_as_routed_and_trained():
    (layer,) = moe_layers(tree(layers__0__experts=ours(PlainExperts, gate=torch.tanh, norm=nn.LayerNorm(2))))
    pools = [f"{pool}_{name}" for name in PROJECTIONS[:2] for pool in ("trained", "frozen")]
    assert names_in(layer, layer.parameters) == pools
    assert names_in(layer, layer.trained_parameters([2])) == pools[0::2]
    assert layer.trained_parameters([]) == []
    (layer,) = moe_layers(tree(layers__0__experts=linears(3, 3, 3)))
    assert names_in(layer, layer.parameters) == [f"{e}.{part}" for e in range(3) for part in ("weight", "bias")]
    assert names_in(layer, layer.trained_parameters([2, 0])) == ["2.weight", "2.bias", "0.weight", "0.bias"]
    assert layer.trained_parameters([]) == []


def test_every_family_is_tested_or_listed_with_a_reason():
    assert len(FAMILIES) >= 60
    assert set(UNBUILDABLE) <= set(zoo.families())
    page = (Path(__file__).parents[3] / "docs" / "families.md").read_text(encoding="utf-8")
    assert {family.partition(":")[0] for family in zoo.families()} <= set(re.findall(r"\w+", page))
    for family in UNBUILDABLE:
        with pytest.raises(Exception):  # noqa: B017 (whatever stands in the way; the list says what)
            output(zoo.tiny(family))


# One family for each way that the weights lie and each activation, through the Triton kernels.
TRITON = ["aria", "deepseek_v4", "gemma4", "gpt_oss", "mixtral", "nemotron_h", "openai_privacy_filter"]


@pytest.mark.parametrize(("family", "backend"), [*((f, "auto") for f in FAMILIES), *((f, "triton") for f in TRITON)])
def test_logits_and_gradients_of_the_selected_experts_equal_the_stock_models(family: str, backend: str):
    stock, ours = zoo.tiny(family), zoo.tiny(family)
    stock.set_experts_implementation("eager")
    chosen = selection(stock)
    swapped(ours, chosen, backend)
    assert zoo.families()[family] in {type(layer.experts).__name__ for layer in moe_layers(stock)}
    expected, found = output(stock), output(ours)
    assert expected.isfinite().all()
    assert close(found, expected)
    backward(expected)
    backward(found)
    reached = False
    for their, our in zip(moe_layers(stock), moe_layers(ours), strict=True):
        ids = chosen.experts.get(our.index, [])
        for name, own in zip(names_of(their), PROJECTIONS, strict=False):
            gradient, trained = getattr(their.experts, name).grad, getattr(our.experts, f"trained_{own}")
            if gradient is None or not ids:
                assert trained.grad is None or not trained.grad.count_nonzero()
                continue
            assert close(trained.grad, gradient[ids])
            reached |= bool(gradient[ids].count_nonzero())
    assert reached
    assert all(".trained_" in n for n, p in ours.named_parameters() if p.grad is not None and p.numel())


@pytest.mark.parametrize("family", FAMILIES)
def test_only_what_the_kernels_cannot_fuse_runs_through_plain_pytorch_and_says_so_once(family: str):
    model = zoo.tiny(family)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        esft.swap(model, selection(model))
    said = [str(w.message) for w in said if "the kernels do not compute" in str(w.message)]
    assert len(said) == (family in PLAIN)


@pytest.mark.parametrize("family", FAMILIES)
def test_as_an_experts_implementation_it_gives_the_eager_logits_and_gradients_of_all_experts(family: str):
    stock, ours = zoo.tiny(family), zoo.tiny(family)
    stock.set_experts_implementation("eager")
    ours.set_experts_implementation("esft")
    expected, found = output(stock), output(ours)
    assert close(found, expected)
    backward(expected)
    backward(found)
    for their, our in zip(moe_layers(stock), moe_layers(ours), strict=True):
        for name in names_of(their):
            gradient = getattr(their.experts, name).grad
            assert gradient is None or close(getattr(our.experts, name).grad, gradient)


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_agree_with_a_count_by_hand(family: str):
    model = zoo.tiny(family)
    batch = {"input_ids": zoo.tokens(), "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    seen: dict[int, list] = {}
    hooks = []
    for layer in moe_layers(model):
        record = seen.setdefault(layer.index, [])
        hooks.append(layer.router.register_forward_hook(lambda _, __, out, r=record: r.append(router_logits(out))))
        hooks.append(layer.experts.register_forward_pre_hook(lambda _, args, r=record: r.extend(args[1:])))
    with torch.no_grad():
        model.base_model(**batch, use_cache=False)
    for hook in hooks:
        hook.remove()
    scores = esft.score_experts(model, [batch])
    for layer in moe_layers(model):
        if not seen[layer.index]:  # experts of images, which saw no token
            assert layer.index not in scores.token_scores
            continue
        logits, index, weights = seen[layer.index]
        tokens, gates, rows = [0.0] * 8, [0.0] * 8, 0
        for t, values in enumerate(gate_values(family, logits.reshape(18, -1)).tolist()):
            for expert, weight in zip(index[t].tolist(), weights[t].tolist(), strict=True):
                if weight:
                    rows += 1
                    tokens[expert] += 1
                    gates[expert] += values[expert] / 18
        expected = {e: count / rows for e, count in enumerate(tokens)}
        assert scores.token_scores[layer.index] == pytest.approx(expected, abs=1e-9)
        assert scores.gate_scores[layer.index] == pytest.approx(dict(enumerate(gates)), abs=1e-6)


def router_logits(out: torch.Tensor | tuple) -> torch.Tensor:
    """First in transformers 5.23; some families of 5.20 have them last, or return nothing else."""
    outputs = out if isinstance(out, tuple) else (out,)
    return next(t for t in (outputs[0], outputs[-1]) if t.is_floating_point() and t.shape[-1] >= 8)


def gate_values(family: str, logits: torch.Tensor) -> torch.Tensor:
    if family in ("gemma4", "diffusion_gemma"):  # whose routers return probabilities
        return logits
    if family == "deepseek_v4":
        return (1 + logits.exp()).log().sqrt()
    return 1 / (1 + (-logits).exp()) if family in SIGMOID else logits.exp() / logits.exp().sum(-1, keepdim=True)


@pytest.mark.parametrize("family", [f for f in FAMILIES if zoo.model_class(f).__name__.endswith("ForCausalLM")])
def test_the_training_loss_is_the_cross_entropy_of_the_models_own_logits(family: str):
    model = zoo.tiny(family)
    ids = zoo.tokens()
    labels = ids.masked_fill(torch.arange(9) < 3, IGNORE)
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    total, count = batch_loss(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    assert count == 12
    assert close(total, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_of_shared_experts_is_found(family: str):
    model = zoo.tiny(family)
    layers = moe_layers(model)
    found = {p for layer in layers for module in layer.shared_experts for p in module.parameters()}
    decoder_layers = {match[0] for layer in layers if (match := re.match(r".*?\.\d+\.", layer.name))}
    for name, parameter in model.named_parameters():
        if any(name.startswith(at) for at in decoder_layers):
            assert (parameter in found) == ("share" in name), name


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_weights_are_detached_views_in_the_order_of_the_projections_with_their_stock_names(family: str):
    model = zoo.tiny(family)
    layer = moe_layers(model)[1]
    names = ["gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias"][: 4 if family == "gpt_oss" else 2]
    expected = {name: getattr(layer.experts, name).detach().clone() for name in names}
    for swapped in (False, True):
        if swapped:
            esft.swap(model, ExpertSelection({1: [5]}))
            layer = moe_layers(model)[1]
        for expert in (5, 2):
            weights = layer.weights(expert)
            assert list(weights) == [f"{layer.name}.{name}" for name in names]
            for weight, name in zip(weights.values(), names, strict=True):
                assert torch.equal(weight, expected[name][expert]) and not weight.requires_grad
                weight += 1  # reaches the model
                expected[name][expert] += 1
    stock = esft.unswap(model).state_dict()
    assert all(torch.equal(stock[f"{layer.name}.{name}"], expected[name]) for name in names)


def test_weights_of_experts_in_a_module_list_are_those_of_its_modules():
    model = listed(tiny_model())
    layer = moe_layers(model)[1]
    weights = layer.weights(7)
    assert list(weights) == [f"{layer.name}.7.{part}.weight" for part in ("gate_proj", "up_proj", "down_proj")]
    for name, weight in weights.items():
        assert weight.data_ptr() == model.get_parameter(name).data_ptr() and not weight.requires_grad


def test_the_stock_modules_names_are_known_of_swapped_layers_and_not_of_ones_swapped_by_hand():
    model = zoo.tiny("nemotron_h")
    layer = moe_layers(model)[1]
    expected = [f"{layer.name}.{name}" for name in ("up_proj", "down_proj")]
    assert list(layer.weights(0)) == expected and layer.transposed is False
    esft.swap(model, ExpertSelection({}))
    layer = moe_layers(model)[1]
    assert list(layer.weights(0)) == expected and layer.transposed is False
    layer.experts.stock_names = ()
    with pytest.raises(esft.InputError, match="^model.layers.3.mixer.experts: swapped by hand"):
        layer.weights(0)


@pytest.mark.parametrize("swapped", [False, True])
def test_whether_weights_are_transposed_is_known_of_either(swapped: bool):
    model = zoo.tiny("gpt_oss")
    if swapped:
        esft.swap(model, ExpertSelection({}))
    assert all(layer.transposed is True for layer in moe_layers(model))


@pytest.mark.parametrize("swapped", [False, True])
def test_a_models_weights_are_those_of_experts_of_shared_experts_and_the_rest(swapped: bool):
    model = tiny_model()
    names = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    if swapped:
        esft.swap(model, ExpertSelection({1: [5, 2]}))
    found = stock_weights(model)
    assert found.num_experts == {1: 8, 2: 8}
    for layer, stack in found.experts.items():
        assert stack.stacked and not stack.transposed
        for expert, weights in ((e, stack.weights(e)) for e in range(stack.num_experts)):
            assert list(weights) == [f"model.layers.{layer}.mlp.experts.{n}_proj" for n in ("gate_up", "down")]
            assert all(torch.equal(weight, names[name][expert]) for name, weight in weights.items())
    assert found.shared.keys() == {name for name in names if "shared" in name}
    assert found.others.keys() == {n for n in names if "shared" not in n and ".experts." not in n}
    for name, weight in (found.shared | found.others).items():
        assert weight.data_ptr() == model.get_parameter(name).data_ptr() and not weight.requires_grad


def test_experts_that_are_modules_of_their_own_are_no_stack():
    stack = stock_weights(listed(tiny_model())).experts[2]
    assert not stack.stacked and stack.num_experts == 8
    assert list(stack.weights(3))[0] == "model.layers.2.mlp.experts.3.gate_proj.weight"
    assert all(stack.transposed for stack in stock_weights(zoo.tiny("gpt_oss")).experts.values())


def test_the_job_over_which_weights_are_spread_is_that_of_the_process_or_an_error(monkeypatch):
    first = FirstOfTwo()
    whole, dealt = (esft.swap(tiny_model(), ExpertSelection({1: [5]}), ranks=ranks) for ranks in (Ranks(), first))
    assert ranks_of(whole) is ALONE and not is_dealt(whole) and not is_apart(whole)
    assert is_dealt(dealt) and is_apart(dealt)
    with pytest.raises(RankError, match="^the weights are spread over 2 processes, and this is a job of 1$"):
        ranks_of(dealt)
    monkeypatch.setattr("esft.parallel.join.current", lambda: first)
    assert ranks_of(dealt) is first


def test_of_dealt_experts_the_pools_are_told_by_what_every_rank_has_of_them():
    def model(*trained: int) -> nn.ModuleDict:
        deal = Deal(0, (trained, ()), ((0, 2), (1, 4)))
        weights = torch.zeros(5, 6, 8), torch.zeros(5, 8, 3)
        return nn.ModuleDict({"a": PlainExperts(*weights, trained, gate=torch.relu, norm=nn.LayerNorm(8), deal=deal)})

    assert dealt_parameters(model()) == {}
    dealt = model(3)
    assert dealt_parameters(dealt) == {f"a.trained_{name}_proj": (1, 0) for name in ("gate_up", "down")}
    # The norm after an expert is everybody's.
    assert {name for name, p in dealt.named_parameters() if p not in dealt_pools(dealt)} == {
        "a.post_expert_norm.weight", "a.post_expert_norm.bias",
    }  # fmt: skip

import gc
import re
import warnings
import weakref

import pytest
import torch
from torch import nn

import esft
from esft.checkpoint.digest import forward_settings, model_digest
from esft.experts.model_state import Base, known_state, swapped_state
from esft.experts.moe_layers import moe_layers
from esft.experts.pooled_experts import Experts
from esft.experts.stock_layout import Layout
from esft.selection import ExpertSelection
from esft.swapping.swap import thaw
from tests.esft import zoo
from tests.esft.experts.test_stock_layout import listed
from tests.esft.models import FAMILIES, tiny_model, token_batch

TRAINED = [5, 2]


def selection_for(family: str, **more) -> ExpertSelection:
    first = FAMILIES[family][1]
    return ExpertSelection({first: TRAINED, 2: [0]}, **more)


def logits(model) -> torch.Tensor:
    return model(**token_batch()).logits


def partly_frozen(model):
    """Every third parameter frozen beforehand, experts, router and attention among them."""
    for place, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(place % 3 != 1)
    return model


def flags(model) -> dict[str, bool]:
    return {name: p.requires_grad for name, p in model.named_parameters()}


def touched(model) -> tuple:
    """What a swap could leave behind: other modules, parameters or flags, and what hangs on the model."""
    modules = {name: id(module) for name, module in model.named_modules()}
    parameters = {name: (id(p), p.requires_grad, p.numel()) for name, p in model.named_parameters()}
    return modules, parameters, {name: id(value) for name, value in vars(model).items()}, hooks(model)


def hooks(model) -> list[int]:
    return list(model._load_state_dict_pre_hooks)


def hangs_on(model) -> set[str]:
    """What a swap hangs on a model."""
    swapped = known_state(model).swapped
    found = {"save_pretrained"} & set(vars(model))
    if swapped is not None:
        found |= {"swapped", "load_hook"} if swapped.load_hook is not None else {"swapped"}
    return found


def swapped_quietly(model, selection: ExpertSelection):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return esft.swap(model, selection)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_swapped_logits_equal_the_stock_models(family: str, backend: str):
    model = tiny_model(family)
    stock = logits(model)
    esft.swap(model, selection_for(family), backend=backend)
    torch.testing.assert_close(logits(model), stock, atol=2e-6, rtol=1e-5)


def test_the_backend_that_packs_plain_weights_takes_no_others():
    with pytest.raises(esft.InputError, match="^backend cpu_packed packs plain weights, not frozen nf4; backend cpu"):
        esft.swap(tiny_model(), ExpertSelection({}), backend="cpu_packed", frozen="nf4")


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_those_of_the_stock_model_in_the_selected_experts_only(family: str):
    stock, swapped = tiny_model(family).double(), tiny_model(family).double()
    stock.set_experts_implementation("eager")  # the only one that computes in float64
    esft.swap(swapped, selection_for(family), backend="cpu")
    for model in (stock, swapped):
        logits(model).square().mean().backward()
    theirs, ours = moe_layers(stock), moe_layers(swapped)
    for their, our in zip(theirs, ours, strict=True):
        chosen = list(our.experts.trained)
        for name, pool in (("gate_up_proj", "trained_gate_up_proj"), ("down_proj", "trained_down_proj")):
            gradient = getattr(our.experts, pool).grad
            expected = getattr(their.experts, name).grad[chosen]
            if chosen:
                # All families' routers weigh in float32, so float64 does not get closer than this.
                assert (gradient - expected).abs().max() <= 1e-6 * expected.abs().max()
        assert our.experts.frozen_gate_up_proj.grad is None
    with_gradient = {n for n, p in swapped.named_parameters() if p.grad is not None and p.numel()}
    assert all(".experts.trained_" in name for name in with_gradient)
    assert with_gradient


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("others", [False, True])
@pytest.mark.parametrize("make", [tiny_model, lambda: listed(tiny_model())], ids=["stacked", "list"])
def test_exactly_what_the_selection_names_trains_and_thaw_brings_it_back(make, shared: bool, others: bool):
    model = swapped_quietly(make(), ExpertSelection({1: TRAINED}, shared, others))

    def trains(name: str) -> bool:
        if ".experts." in name:
            return name.startswith(tuple(f"model.layers.1.mlp.experts.{part}" for part in ("trained_", "5.", "2.")))
        return shared if "shared_experts" in name else others

    expected = {name: trains(name) for name in flags(model)}
    assert sum(expected.values()) >= 2
    assert flags(model) == expected
    model.requires_grad_(False)
    assert thaw(model) is model
    assert flags(model) == expected


def test_an_empty_selection_trains_nothing():
    assert not any(flags(esft.swap(tiny_model(), ExpertSelection({}))).values())
    assert not any(flags(esft.swap(tiny_model(), ExpertSelection({1: [], 2: []}))).values())


def test_thaw_leaves_what_trains_already_and_refuses_a_stock_model():
    model = esft.swap(tiny_model(), ExpertSelection({2: [0]}))
    before = flags(model)
    model.model.extra = nn.Parameter(torch.zeros(1))  # as PEFT adds its own
    model.lm_head.weight.requires_grad_()
    thaw(model)
    assert flags(model) == before | {"model.extra": True, "lm_head.weight": True}
    with pytest.raises(esft.InputError, match="the model is not swapped"):
        thaw(tiny_model())


@pytest.mark.parametrize("others", [False, True])
def test_a_norm_that_all_experts_share_is_a_non_expert_module(others: bool):
    model = zoo.tiny("muse_spark")
    layer = moe_layers(model)[0]
    swapped_quietly(model, ExpertSelection({layer.index: [1]}, non_expert_modules=others))
    assert model.get_parameter(f"{layer.name}.post_expert_norm.weight").requires_grad == others
    assert model.get_parameter(f"{layer.name}.trained_down_proj").requires_grad
    assert not model.get_parameter(f"{layer.name}.frozen_down_proj").requires_grad


def test_no_gradient_goes_below_the_lowest_trained_layer():
    model = esft.swap(tiny_model(), ExpertSelection({2: [0]}))
    needed = {}
    for layer in moe_layers(model):
        layer.experts.register_forward_hook(lambda _, args, out, i=layer.index: needed.update({i: out.requires_grad}))
    logits(model)
    assert needed == {1: False, 2: True}


@pytest.mark.parametrize("family", FAMILIES)
def test_unswap_gives_the_stock_modules_back_with_tuned_weights_and_the_flags_as_they_were(family: str):
    model = partly_frozen(tiny_model(family))
    before, names = flags(model), [n for n, _ in model.named_parameters()]
    assert True in before.values() and False in before.values()
    stock = {layer.name: layer.experts for layer in moe_layers(model)}
    first = next(iter(stock.values()))
    gate_up, down = first.gate_up_proj.detach().clone(), first.down_proj.detach().clone()
    esft.swap(model, selection_for(family))
    with torch.no_grad():
        moe_layers(model)[0].experts.trained_down_proj.mul_(1.5)
    tuned = logits(model)
    assert esft.unswap(model) is model
    assert [n for n, _ in model.named_parameters()] == names
    assert flags(model) == before
    assert all(layer.experts is stock[layer.name] for layer in moe_layers(model))
    down[TRAINED] *= 1.5
    assert torch.equal(first.gate_up_proj, gate_up) and torch.equal(first.down_proj, down)
    assert not hangs_on(model) and not hooks(model)
    torch.testing.assert_close(logits(model), tuned, atol=2e-6, rtol=1e-5)


def test_unswap_leaves_parameters_that_were_added_since_as_they_are():
    model = esft.swap(partly_frozen(tiny_model()), ExpertSelection({1: [0]}))
    model.model.first, model.model.second = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1), False)
    esft.unswap(model)
    assert model.model.first.requires_grad and not model.model.second.requires_grad


def test_a_list_of_experts_stays_and_gets_its_flags_back():
    model = partly_frozen(listed(tiny_model()))
    before, experts = flags(model), [layer.experts for layer in moe_layers(model)]
    swapped_quietly(model, ExpertSelection({1: TRAINED}))
    assert all(layer.experts is own for layer, own in zip(moe_layers(model), experts, strict=True))
    assert swapped_state(model).stock == {}
    esft.unswap(model)
    assert all(layer.experts is own for layer, own in zip(moe_layers(model), experts, strict=True))
    assert flags(model) == before


def test_a_swapped_model_remembers_its_base_and_saves_and_reads_stock_checkpoints():
    model = partly_frozen(tiny_model())
    digest, before = model_digest(model), flags(model)
    stock = {layer.name: layer.experts for layer in moe_layers(model)}
    selection = ExpertSelection({1: TRAINED})
    assert known_state(model).swapped is None
    assert esft.swap(model, selection) is model
    state = swapped_state(model)
    assert state is model.esft_state.swapped and state.load_hook is not None
    assert state.selection is selection and state.required_grad == before
    settings = forward_settings(model.config)
    assert state.base == Base(model.config._name_or_path, digest, model.dtype, settings)
    assert list(state.stock) == ["model.layers.1.mlp.experts", "model.layers.2.mlp.experts"]
    assert all(state.stock[name] is experts for name, experts in stock.items())
    assert all(layer.experts.stock_names == ("gate_up_proj", "down_proj") for layer in moe_layers(model))
    assert not any(p.numel() for experts in stock.values() for p in experts.parameters())
    assert len(hangs_on(model)) == 3 and len(hooks(model)) == 1


def test_the_experts_get_what_swap_was_told_and_each_layers_own_ids():
    model = esft.swap(tiny_model(), ExpertSelection({1: TRAINED}), "reference", "frozen")
    experts = [layer.experts for layer in moe_layers(model)]
    assert [(e.backend, e.recompute, e.trained) for e in experts] == [
        ("reference", "frozen", (5, 2)), ("reference", "frozen", ())
    ]  # fmt: skip
    experts = [layer.experts for layer in moe_layers(esft.swap(tiny_model(), ExpertSelection({2: [7]})))]
    assert [(e.backend, e.recompute, e.trained) for e in experts] == [("auto", "none", ()), ("auto", "none", (7,))]


def test_frozen_experts_go_into_the_format_that_swap_was_told_which_the_model_remembers():
    model = esft.swap(tiny_model(), ExpertSelection({1: TRAINED}), frozen="nf4")
    packed = [[layer.experts.is_packed(expert) for expert in (5, 0)] for layer in moe_layers(model)]
    assert packed == [[False, True], [True, True]]
    assert (swapped_state(model).frozen, swapped_state(model).lossless) == ("nf4", False)
    exact = swapped_state(esft.swap(tiny_model(), ExpertSelection({})))
    assert (exact.frozen, exact.lossless) == ("bf16", True)


@pytest.mark.parametrize("make", [lambda: listed(tiny_model()), lambda: zoo.tiny("inkling2")], ids=["list", "plain"])
def test_experts_that_the_kernels_do_not_compute_cannot_be_frozen_in_a_format(make):
    model = make()
    before = touched(model)
    with pytest.raises(esft.InputError, match="experts: the kernels do not compute these .* be frozen in int8$"):
        esft.swap(model, ExpertSelection({}), frozen="int8")
    assert touched(model) == before


def test_each_layers_training_mode_is_kept_both_ways():
    model = tiny_model()
    moe_layers(model)[1].experts.train()
    esft.swap(model, ExpertSelection({1: [0]}))
    assert [layer.experts.training for layer in moe_layers(model)] == [False, True]
    moe_layers(model)[0].experts.train()
    moe_layers(model)[1].experts.eval()
    esft.unswap(model)
    assert [layer.experts.training for layer in moe_layers(model)] == [True, False]


def test_generate_with_cache_gives_the_stock_models_tokens():
    model = tiny_model()
    prompt = {"input_ids": torch.tensor([[256, 5, 9, 33]]), "max_new_tokens": 12, "do_sample": False}
    expected = model.generate(**prompt)
    assert torch.equal(esft.swap(model, ExpertSelection({})).generate(**prompt), expected)


def refused(model, message: str, *args) -> None:
    """The swap raises InputError with this message and leaves everything as it is."""
    partly_frozen(model)
    before = touched(model)
    with pytest.raises(esft.InputError, match=message):
        esft.swap(model, *args)
    assert touched(model) == before


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        ({0: [1]}, r"selection names layer 0; the model's MoE layers are \[1, 2\]"),
        ({1: [8]}, r"selection names experts \[8\] of layer 1, which has 8 experts"),
        ({1: [3, 3]}, "selection names an expert of layer 1 twice"),
    ],
)
def test_a_selection_that_does_not_fit_changes_nothing(experts: dict, message: str):
    refused(tiny_model(), message, ExpertSelection(experts))
    refused(listed(tiny_model()), message, ExpertSelection(experts))


def test_a_model_without_moe_layers_is_refused():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(esft.InputError, match="LlamaForCausalLM has no MoE layers"):
        esft.swap(LlamaForCausalLM(config), ExpertSelection({}))


def test_swapping_twice_and_unswapping_a_stock_model_are_refused():
    model = esft.swap(tiny_model(), ExpertSelection({}))
    refused(model, r"the model is swapped already \(unswap it first\)", ExpertSelection({}))
    with pytest.raises(esft.InputError, match="the model is not swapped"):
        esft.unswap(tiny_model())


def test_a_model_with_an_adapter_set_is_refused_until_its_base_is_back(tmp_path):
    tuned = esft.swap(tiny_model(), ExpertSelection({1: [0]}))
    with torch.no_grad():
        moe_layers(tuned)[0].experts.trained_down_proj.mul_(2)
    model = esft.load_adapter(tiny_model(), esft.save_adapter(tuned, tmp_path / "a"), "a")
    esft.set_adapter(model, "a")
    refused(model, r"the model has an adapter set: swap its base \(set_adapter\(model, None\)", ExpertSelection({}))
    esft.set_adapter(model, None)
    assert known_state(esft.swap(model, ExpertSelection({}))).swapped is not None


def expert_parallel(experts: nn.Module) -> None:
    experts._is_expert_parallel = True


def offloaded(experts: nn.Module) -> None:
    experts.down_proj = nn.Parameter(experts.down_proj.to("meta"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda e: e.register_parameter("down_proj", None),
            r"2.mlp.experts.down_proj: experts of NoneType are not supported",
        ),
        (
            lambda e: setattr(e, "gate_up_proj", nn.Parameter(e.gate_up_proj.to(torch.float8_e4m3fn))),
            "2.mlp.experts.gate_up_proj: experts of torch.float8_e4m3fn are not supported",
        ),
        (
            lambda e: setattr(e, "gate_up_proj", nn.Parameter(e.gate_up_proj[:, 1:])),
            r"2.mlp.experts.gate_up_proj: has shape \(8, 39, 32\), not \(8, 40, 32\) as down_proj has it",
        ),
        (expert_parallel, r"2.mlp.experts: the experts are spread over ranks: join the job"),
        (offloaded, r"2.mlp.experts: the weights are not in memory \(offloaded\?\), so they cannot be swapped"),
    ],
)
def test_experts_in_a_layout_that_is_not_supported_are_refused_before_anything_is_touched(change, message: str):
    model = tiny_model()
    change(moe_layers(model)[1].experts)
    refused(model, rf"^model\.layers\.{message}", ExpertSelection({}))


@pytest.mark.parametrize(
    ("change", "message"),
    [(expert_parallel, "the experts are spread over ranks"), (offloaded, "the weights are not in memory")],
)
def test_of_several_layers_that_cannot_be_swapped_the_first_is_named(change, message: str):
    model = tiny_model()
    for layer in moe_layers(model):
        change(layer.experts)
    refused(model, rf"^model\.layers\.1\.mlp\.experts: {message}", ExpertSelection({}))


def test_a_list_of_experts_that_are_not_in_memory_is_refused():
    model = listed(tiny_model())
    moe_layers(model)[1].experts[3].to("meta")
    refused(model, r"^model\.layers\.2\.mlp\.experts: the weights are not in memory", ExpertSelection({}))


def test_a_backend_that_cannot_run_here_is_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for backend, message in (("gpu", "backend must be one of .*'gpu'"), ("triton", "TRITON_INTERPRET=1")):
        refused(tiny_model(), message, ExpertSelection({}), backend)
    model = tiny_model().to("meta")  # cpu runs on a CPU only, and the model's device is what counts
    for layer in moe_layers(model):
        layer.experts.to_empty(device="cpu")
    refused(model, "backend 'cpu' computes on CPU tensors, got tensors on meta", ExpertSelection({}), "cpu")


def test_a_recompute_that_does_not_exist_is_refused():
    refused(tiny_model(), "recompute must be one of none, frozen, got 'all'", ExpertSelection({}), "auto", "all")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, KeyboardInterrupt])
def test_a_swap_that_fails_halfway_leaves_the_stock_model(monkeypatch, error: type[BaseException]):
    model = partly_frozen(tiny_model())
    before, grads = logits(model), flags(model)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    stock = [layer.experts for layer in moe_layers(model)]
    assert True in grads.values() and False in grads.values()
    real, made = Layout.swapped, []

    def fails_at_the_second(self, *args, **kwargs):
        made.append(self)
        if len(made) == 2:
            assert isinstance(moe_layers(model)[0].experts, Experts)
            raise error("no memory left")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Layout, "swapped", fails_at_the_second)
    with pytest.raises(error, match="no memory left"):
        esft.swap(model, ExpertSelection({1: [0]}))
    assert known_state(model).swapped is None and len(made) == 2
    assert not hangs_on(model) and not hooks(model)
    assert flags(model) == grads
    assert all(layer.experts is own for layer, own in zip(moe_layers(model), stock, strict=True))
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert torch.equal(logits(model), before)


def test_frozen_experts_that_a_format_cannot_hold_are_one_error_and_leave_the_stock_model():
    model = tiny_model()
    with torch.no_grad():
        moe_layers(model)[1].experts.down_proj[3, 0, 0] = torch.inf
    stock = [layer.experts for layer in moe_layers(model)]
    with pytest.raises(esft.InputError, match="^int8: weights of expert 0 are not finite$"):
        esft.swap(model, ExpertSelection({1: [0]}), frozen="int8")
    assert known_state(model).swapped is None and not hangs_on(model)
    assert all(layer.experts is own for layer, own in zip(moe_layers(model), stock, strict=True))
    esft.swap(model, ExpertSelection({2: [3]}), frozen="int8")  # what trains is in no format


def test_experts_without_transformers_flags_are_not_taken_for_spread_ones():
    model = zoo.tiny("step3p7", sliding_window=16)
    assert not any(hasattr(layer.experts, "_is_expert_parallel") for layer in moe_layers(model))
    swapped_quietly(model, ExpertSelection({}))
    assert all(isinstance(layer.experts, Experts) for layer in moe_layers(model))


def list_of_two_classes():
    model = listed(tiny_model())
    for layer in moe_layers(model):
        layer.experts[0].__class__ = type("First", (type(layer.experts[0]),), {})
    return model


def said_by_swap(model) -> list[warnings.WarningMessage]:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        esft.swap(model, ExpertSelection({}))
    return [warning for warning in said if "the kernels do not compute" in str(warning.message)]


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (
            list_of_two_classes,
            "First: the kernels do not compute these experts: they are a ModuleList, which runs through the model's",
        ),
        (lambda: zoo.tiny("muse_spark"), "MuseSparkExperts: .* they have a norm after each expert, which runs"),
        (lambda: zoo.tiny("inkling2"), "Inkling2Experts: .* they have an activation of their own, which runs"),
    ],
    ids=["list", "norm", "activation"],
)
def test_experts_that_train_slowly_are_named_once_where_swap_is_called(make, expected: str):
    model = make()
    assert len(moe_layers(model)) > 1
    said = said_by_swap(model)
    assert [warning.filename for warning in said] == [__file__]
    assert re.match(expected, str(said[0].message))


def test_experts_that_the_kernels_compute_are_passed_over_in_silence():
    assert not said_by_swap(tiny_model())


def test_at_most_one_layers_experts_exist_twice(monkeypatch):
    model, real, held = tiny_model(), Layout.swapped, []
    stock = [layer.experts for layer in moe_layers(model)]

    def counted(self, *args, **kwargs):
        held.append([experts.down_proj.numel() > 0 for experts in stock])
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Layout, "swapped", counted)
    esft.swap(model, ExpertSelection({}))
    assert held == [[True, True], [False, True]]


def test_unswap_holds_one_layers_pools_at_a_time(monkeypatch):
    model = esft.swap(tiny_model(), ExpertSelection({1: [0], 2: [3]}))
    pools = [weakref.ref(layer.experts) for layer in moe_layers(model)]
    alive: list[int] = []
    real = Experts.stacked

    def counted(self):
        gc.collect()
        alive.append(sum(ref() is not None for ref in pools))
        return real(self)

    monkeypatch.setattr(Experts, "stacked", counted)
    esft.unswap(model)
    assert alive == list(range(len(pools), 0, -1))


def test_a_model_without_shared_experts_is_not_swapped_to_train_them():
    model = tiny_model("mixtral")
    with pytest.raises(esft.InputError, match="^selection names shared experts; the model has none$"):
        esft.swap(model, ExpertSelection({0: [1]}, shared_experts=True))
    assert known_state(model).swapped is None

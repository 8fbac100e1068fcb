import copy

import pytest
import torch
from torch import nn

import esft
from esft.errors import InputError
from esft.experts.model_state import (
    Adapters,
    Base,
    MixedAdapters,
    ModelState,
    OwnMethod,
    Swapped,
    check_lossless,
    known_state,
    model_state,
    once_per_model,
    settle_adapter,
    swapped_state,
    uncompiled,
)
from esft.selection import ExpertSelection
from tests.esft.models import tiny_model

BASE = Base("tiny", "digest", torch.float32, {})


def test_looking_at_a_model_puts_nothing_on_it():
    model = nn.Linear(2, 2)
    before = set(vars(model))
    assert known_state(model) == ModelState(None, None, None, frozenset(), {})
    assert set(vars(model)) == before


def test_what_is_added_to_a_models_state_stays_with_it_and_with_its_copies():
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    model_state(model).settled = frozenset({"a"})
    assert model_state(model) is known_state(model) is vars(model)["esft_state"]
    assert known_state(other).settled == frozenset()
    twin = copy.deepcopy(model)
    assert known_state(twin).settled == {"a"} and known_state(twin) is not known_state(model)


def test_a_wrapper_has_not_its_models_state():
    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module):
            super().__init__()
            self.inner = inner

        def __getattr__(self, name: str):
            return super().__getattr__(name) if name in ("inner", "_modules") else getattr(self.inner, name)

    model = nn.Linear(2, 2)
    model_state(model).settled = frozenset({"a"})
    assert known_state(Wrapper(model)).settled == frozenset()
    assert model_state(Wrapper(model)).settled == frozenset()


def test_a_function_runs_once_for_each_model():
    asked = []

    @once_per_model
    def answer(model):
        """What it says."""
        asked.append(model)
        return len(asked)

    @once_per_model
    def other(model):
        return "other"

    one, two = nn.Linear(2, 2), nn.Linear(2, 2)
    assert [answer(one), answer(two), answer(one), other(one)] == [1, 2, 1, "other"]
    assert asked == [one, two] and answer.__doc__ == "What it says."


def test_a_function_gets_what_the_caller_knows_of_the_model():
    find = once_per_model(lambda model, *known: known)
    model = nn.Linear(2, 2)
    assert find(model, 1, 2) == (1, 2) and find(model, 3) == (1, 2)


def test_what_is_found_may_be_nothing():
    asked = []
    find = once_per_model(lambda model: asked.append(model))
    model = nn.Linear(2, 2)
    assert find(model) is None and find(model) is None and len(asked) == 1


def test_the_state_of_a_swap_is_there_for_swapped_models_only():
    model = nn.Linear(2, 2)
    with pytest.raises(esft.InputError, match="^the model is not swapped$"):
        swapped_state(model)
    swapped = Swapped(ExpertSelection({}), BASE, {}, "bf16", "bf16", True, {})
    assert swapped.stock == {} and swapped.load_hook is None
    model_state(model).swapped = swapped
    assert swapped_state(model) is swapped


def test_what_needs_the_stock_models_weights_is_refused_where_some_have_lost_precision():
    check_lossless(esft.swap(tiny_model(), ExpertSelection({})), "merging")
    lossy = esft.swap(tiny_model(), ExpertSelection({}), frozen="int8")
    with pytest.raises(esft.InputError, match="^merging needs the stock model's weights, .* are in int8, which has"):
        check_lossless(lossy, "merging")
    with pytest.raises(esft.InputError, match="^the model is not swapped$"):
        check_lossless(tiny_model(), "merging")


def test_a_set_adapter_becomes_a_part_of_the_base_and_one_that_is_only_held_stays():
    model = nn.Linear(2, 2)
    settle_adapter(model)
    state = model_state(model)
    state.adapters = Adapters(BASE, base={"a": torch.zeros(1)})
    settle_adapter(model)
    assert state.adapters is not None and state.settled == frozenset()
    state.adapters.active, state.settled = "default", frozenset({"b"})
    settle_adapter(model)
    assert state.adapters is None and state.settled == {"a", "b"}


def test_a_compiled_model_is_looked_into_and_swaps_back():
    model = tiny_model()
    assert uncompiled(model) is model
    esft.swap(model, ExpertSelection({1: [2]}))
    compiled = torch.compile(model)
    assert uncompiled(compiled) is model
    assert esft.unswap(compiled) is compiled
    assert known_state(model).swapped is None
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_numbers_of_adapters_begin_with_the_bases():
    mixed = MixedAdapters({"x": ExpertSelection({}), "y": ExpertSelection({})})
    found = mixed.numbers(["y", "__base__", "x", "y"], 4, torch.device("cpu"))
    assert found.dtype == torch.int64 and found.tolist() == [2, 0, 1, 2]
    assert mixed.numbers((), None, torch.device("meta")).is_meta
    for names, message in (
        (["x", "z"], r"no adapter named 'z'; it holds \['x', 'y'\]"),
        (["x"], "has 1 names, and the batch 2 sequences"),
        ("x", "must be a list of names, one for each sequence, got 'x'"),
        ([1, 2], "must be a list of names"),
    ):
        with pytest.raises(InputError, match=message):
            mixed.numbers(names, 2, torch.device("cpu"))


def test_every_token_has_its_sequences_adapter():
    mixed = MixedAdapters({})
    assert mixed.of_tokens(6) is None
    mixed.generating = torch.tensor([2, 1])
    assert mixed.of_tokens(6).tolist() == [2, 2, 2, 1, 1, 1]
    mixed.running = torch.tensor([0, 3, 3])  # of the forward pass, before that of generate
    assert mixed.of_tokens(6).tolist() == [0, 0, 3, 3, 3, 3]
    assert mixed.of_tokens(0).tolist() == []
    with pytest.raises(InputError, match="7 tokens do not divide into 3 sequences"):
        mixed.of_tokens(7)
    mixed.running = torch.tensor([], dtype=torch.int64)
    assert mixed.of_tokens(0).tolist() == []


def test_a_method_of_its_own_is_the_copys_in_a_copy_and_works_when_the_model_is_gone():
    def scaled(model, factor):
        return model.weight * factor

    model = nn.Linear(2, 2)
    vars(model)["scaled"] = OwnMethod(model, "scaled", scaled)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        model.weight.zero_()
    assert model.scaled(2).count_nonzero() == 0 and torch.equal(twin.scaled(factor=2), 2 * twin.weight)
    weight, method, held = twin.weight, twin.scaled, vars(twin)
    del twin
    assert "scaled" not in held and torch.equal(method(3), 3 * weight)

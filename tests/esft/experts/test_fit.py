import pytest

import esft
from esft.experts.fit import check_fits, check_shared
from esft.experts.model_state import model_state
from esft.experts.moe_layers import moe_layers
from esft.selection import ExpertSelection
from tests.esft.models import tiny_model


def test_shared_experts_are_there_or_are_not_selected():
    both = ExpertSelection({}, shared_experts=True)
    for family, has in (("deepseek_v2", True), ("qwen2_moe", True), ("qwen3_moe", False), ("mixtral", False)):
        layers = moe_layers(tiny_model(family))
        check_fits(ExpertSelection({}), layers)
        if has:
            check_fits(both, layers)
            continue
        for check in (check_fits, check_shared):
            with pytest.raises(esft.InputError, match="^selection names shared experts; the model has none$"):
                check(both, layers)


def test_experts_that_do_not_exist_do_not_fit():
    with pytest.raises(esft.InputError, match=r"names experts \[9\] of layer 1"):
        check_fits(ExpertSelection({1: [9]}), moe_layers(tiny_model()))


def test_a_model_without_shared_experts_is_not_swapped_to_train_them():
    model = tiny_model("mixtral")
    with pytest.raises(esft.InputError, match="the model has none"):
        esft.swap(model, ExpertSelection({0: [1]}, shared_experts=True))
    assert model_state(model).swapped is None

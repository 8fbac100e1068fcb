"""What LoRA is added to; a training by it is in the tests of the methods."""

import sys

import pytest

from esft.adapters.lora import add_lora, require_peft
from esft.errors import InputError
from tests.esft import zoo
from tests.esft.models import tiny_model


def test_lora_adds_nothing_to_the_biases_of_stacked_experts(monkeypatch):
    monkeypatch.setattr(pytest.importorskip("peft"), "get_peft_model", lambda *asked: asked)
    _, lora = add_lora(zoo.tiny("gpt_oss"), 8, 16)
    assert {name.rpartition(".")[2] for name in lora.target_parameters} == {"gate_up_proj", "down_proj"}
    assert (lora.r, lora.lora_alpha) == (8, 16)


def test_only_what_is_added_trains_and_the_head_has_nothing_added():
    pytest.importorskip("peft")
    trained = {name for name, p in add_lora(tiny_model("olmoe"), 2, 4).named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    assert not any("lm_head" in name for name in trained) and any("experts" in name for name in trained)


def test_a_rank_above_that_of_every_matrix_is_refused():
    pytest.importorskip("peft")
    add_lora(tiny_model("deepseek_v2"), 32, 16)  # query heads of 4 x 16 from 32 values
    with pytest.raises(InputError, match="^lora_rank 33: no matrix of the model has a rank above 32$"):
        add_lora(tiny_model("deepseek_v2"), 33, 16)
    # Its linear layers have a rank of 8 at the most, an expert's matrices one of 32.
    assert add_lora(tiny_model("qwen3_moe", head_dim=2), 9, 16)


def test_without_peft_the_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match=r"^method lora needs the peft package: pip install 'esft\[lora\]'$"):
        require_peft()

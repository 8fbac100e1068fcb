import pytest
from transformers import AutoConfig, PreTrainedConfig

import esft
from esft.checkpoint.configuration import check_model, check_numbers
from tests.esft import zoo
from tests.esft.models import FAMILIES, tiny_model


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"num_hidden_layers": 501}, "num_hidden_layers"),
        ({"n_layer": 501}, "n_layer"),
        ({"text_config": {"num_local_experts": 65_537}}, "num_local_experts"),
        ({"n_routed_experts": 1e30}, "n_routed_experts"),
        ({"hidden_size": 2**24 + 1}, "hidden_size"),
        ({"head_dim": 2**30}, "head_dim"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"hidden_size": -1}, "hidden_size"),
    ],
    ids=str,
)
def test_a_number_that_no_model_has_is_named(config: dict, name: str):
    with pytest.raises(esft.InputError, match=f"^here: {name} is "):
        check_numbers(config, "here")


def test_experts_are_counted_over_the_layers():
    check_numbers({"num_hidden_layers": 256, "num_experts": 4096}, "here")
    with pytest.raises(esft.InputError, match="^here: says 1,052,672 experts in all; at most 1,048,576 are supported"):
        check_numbers({"num_hidden_layers": 257, "num_experts": 4096}, "here")
    with pytest.raises(esft.InputError, match="^here: says 1,052,672 experts in all"):  # the most of several counts
        check_numbers(
            {"num_hidden_layers": 257, "num_dense_layers": 1, "num_experts": 4096, "n_shared_experts": 2}, "here"
        )


def test_implementations_that_are_no_code_from_the_hub_pass():
    for name in ("eager", "sdpa", "flash_attention_2", None):
        check_numbers({"_attn_implementation": name, "vision_config": {"attn_implementation": name}}, "here")
    check_numbers({"experts_implementation": "grouped_mm", "implementation": "a/repo"}, "here")


def test_what_is_no_size_has_no_limit():
    check_numbers({"pad_token_id": -1, "max_position_embeddings": 2**40, "use_cache": True, "num_experts": 0}, "here")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_experts_per_tok": 100, "num_experts": 8}, "num_experts_per_tok is 100, of 8 experts"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok is 0, which no model has"),
        ({"attention_dropout": 2.0}, "attention_dropout is 2.0, no share of values to drop"),
        ({"resid_pdrop": -1}, "resid_pdrop is -1, no share of values to drop"),
        ({"max_position_embeddings": -5}, "max_position_embeddings is -5, which no model has"),
        ({"architectures": "x"}, "architectures is 'x', not a list of names"),
        ({"architectures": [7]}, r"architectures is \[7\], not a list of names"),
        ({"attn_implementation": "a/repo"}, "attn_implementation is 'a/repo', which is not supported; take it out"),
        ({"_attn_implementation_internal": "a/repo"}, "_attn_implementation_internal is 'a/repo', which is .*"),
        ({"attn_implementation": {"": "sdpa"}}, "attn_implementation is {'': 'sdpa'}, which is not supported; .*"),
        ({"text_config": {"_experts_implementation": "sonicmoe"}}, "_experts_implementation is 'sonicmoe', which .*"),
    ],
)
def test_numbers_that_do_not_fit_each_other_and_names_that_are_none_are_refused(change: dict, said: str):
    with pytest.raises(esft.InputError, match=f"^c: {said}$"):
        check_numbers(change, "c")


@pytest.mark.parametrize(
    ("rope", "said"),
    [
        (5, "{name} is 5, not a mapping"),
        ([1], r"{name} is \[1\], not a mapping"),
        ({"rope_type": 5}, "{name}: rope_type is 5, not a name"),
        ({"type": None}, "{name}: type is None, not a name"),
        ({"rope_theta": "x"}, "{name}: rope_theta is 'x', not a number above 0"),
        ({"rope_theta": None}, "{name}: rope_theta is None, not a number above 0"),
        ({"rope_theta": True}, "{name}: rope_theta is True, not a number above 0"),
        ({"factor": -3}, "{name}: factor is -3, not a number above 0"),
        ({"factor": 1e308}, r"{name}: factor is 1e\+308, not a number above 0"),
        ({"beta_fast": "x"}, "{name}: beta_fast is 'x', not a number"),
        ({"full_attention": {"rope_theta": 0}}, "{name}: full_attention: rope_theta is 0, not a number above 0"),
    ],
)
def test_what_is_no_parameter_of_a_rotary_embedding_is_named(rope, said: str):
    for name in ("rope_parameters", "rope_scaling"):
        for whole in ({name: rope}, {"text_config": {name: rope}}):
            with pytest.raises(esft.InputError, match=f"^c: {said.format(name=name)}$"):
                check_numbers(whole, "c")


def test_parameters_of_rotary_embeddings_that_there_are_pass():
    for rope in (
        None, {}, {"rope_type": "yarn", "factor": 40, "mscale": 0.707, "beta_fast": 32, "attention_factor": None},
        {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_type": "default"}, "other": None},
        {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0]},
    ):  # fmt: skip
        check_numbers({"rope_parameters": rope, "rope_theta": 10000}, "c")
    with pytest.raises(esft.InputError, match="^c: rope_theta is 0, not a number above 0$"):
        check_numbers({"rope_theta": 0}, "c")


def config(**change: object):
    settings = tiny_model().config.to_dict() | change
    return AutoConfig.for_model(settings.pop("model_type"), **settings)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_experts_per_tok": None}, "num_experts_per_tok is None, not a number of the 8 experts"),
        ({"n_group": 3}, "n_group is 3, which does not divide the 8 experts"),
        ({"n_group": 0}, "n_group is 0, which does not divide the 8 experts"),
        ({"n_group": -2}, "n_group is -2, which does not divide the 8 experts"),
        ({"n_group": None}, "n_group is None, which does not divide the 8 experts"),
        ({"topk_group": 0}, "topk_group is 0, of 2 groups of experts"),
        ({"topk_group": 3}, "topk_group is 3, of 2 groups of experts"),
        ({"topk_group": None}, "topk_group is None, of 2 groups of experts"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok is 5, and topk_group leaves 4 experts to choose from"),
        ({"topk_method": "nope"}, "topk_method is 'nope', none of greedy, group_limited_greedy"),
        ({"return_dict": False}, "return_dict is False; only true is supported"),
        ({"architectures": ["BertModel"]}, "architectures names BertModel, which is no model of type deepseek_v2"),
        ({"architectures": ["PreTrainedModel"]}, "architectures names PreTrainedModel, which is no model of type"),
        ({"rope_parameters": {"rope_type": "nope"}}, "rope_type is 'nope', which transformers does not have"),
    ],
    ids=str,
)
def test_what_no_model_of_the_kind_can_compute_with_is_named(change: dict, said: str):
    with pytest.raises(esft.InputError, match=f"^c: {said}"):
        check_model(config(**change), "c")


def test_groups_that_the_router_does_not_use_may_be_any():
    check_model(config(topk_method="greedy", n_group=None, topk_group=None), "c")
    check_model(config(topk_method="greedy", n_group=3), "c")
    check_model(config(architectures=["OfALaterVersion", "DeepseekV2ForCausalLM"]), "c")
    null = AutoConfig.for_model("deepseek_v3", n_group=None, topk_group=None)  # which always chooses groups
    with pytest.raises(esft.InputError, match="n_group is None"):
        check_model(null, "c")


def test_code_of_a_checkpoint_knows_what_it_means():
    class Own(PreTrainedConfig):
        model_type = "own"

    check_model(Own(architectures=["BertModel"], num_experts=8, num_experts_per_tok=None), "c")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tiny_model_passes(family: str):
    model = tiny_model(family)
    check_model(model.config, "c")
    check_numbers(model.config.to_dict(), "c")


@pytest.mark.parametrize("family", zoo.families())
def test_every_family_passes(family: str):
    whole = zoo.tiny(family).config
    check_model(whole, "c")
    check_numbers(whole.to_dict(), "c")

"""All that is used of transformers beyond its documentation is in one module, and was tried with named versions."""

import ast
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoConfig

import esft
from esft import transformers_internals as internals
from esft.selection import ExpertSelection
from esft.transformers_internals import recompute_layers_of, whole_layers
from tests.esft import zoo
from tests.esft.models import tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[2]
OTHERS = [path for path in sorted((ROOT / "esft").rglob("*.py")) if path.name != "transformers_internals.py"]
OF_PYTORCH = {"_modules", "_get_fsdp_state", "_comm_ctx", "_state_ctx"}


def test_the_transformers_at_hand_is_one_that_was_tried():
    assert transformers.__version__ in internals.TRIED
    pinned = (ROOT / "tools/constraints.txt").read_text()
    assert all(f"transformers=={version}" in pinned for version in internals.TRIED)


@pytest.mark.parametrize("path", OTHERS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_other_module_looks_inside(path: Path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert not (node.module or "").startswith("transformers."), node.module
        elif isinstance(node, ast.Import):
            assert not any(name.name.startswith("transformers.") for name in node.names)
        elif isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.endswith("__"):
            own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls", "os")  # os._exit is documented
            assert own or node.attr in OF_PYTORCH, f"line {node.lineno}: {node.attr}"
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr"):
            name = node.args[1]
            assert not (isinstance(name, ast.Constant) and str(name.value).startswith("_")), f"line {node.lineno}"


def test_what_a_model_says_of_itself(tmp_path):
    model = tiny_model()
    assert internals.base_name(model) == "" and internals.tied_names(model) == {}
    assert internals.tied_names(SimpleNamespace()) == {}  # of a model that says nothing of it
    tied = tiny_model(tie_word_embeddings=True)
    assert internals.tied_names(tied) == {"lm_head.weight": "model.embed_tokens.weight"}
    assert internals.has_peft_adapter(model) is False and internals.spread_by(model) is None
    model.save_pretrained(tmp_path)
    assert internals.base_name(type(model).from_pretrained(tmp_path)) == str(tmp_path)
    model._hf_peft_config_loaded = True
    model.config.distributed_config = how = object()
    assert internals.has_peft_adapter(model) is True and internals.spread_by(model) is how
    internals.forget_spread(model)
    internals.forget_spread(model)  # of one that is not, nothing
    assert internals.spread_by(model) is None
    assert internals.is_cut_up_whole(model) is False
    model._is_fsdp_managed_module = True
    assert internals.is_cut_up_whole(model) is True
    with torch.device("meta"):
        assert all(p.is_meta for p in internals.without_weights(type(model), tiny_model().config).parameters())


FLAGS = {  # gated, transposed, biased, a function of its own, a norm
    "deepseek_v2": (True, False, False, True, False),
    "gpt_oss": (True, True, True, True, False),
    "nemotron_h": (False, False, False, True, False),
    "muse_spark": (True, False, False, True, True),
}


def test_attention_may_be_another_where_it_is_fused_and_no_code_asks_for_its_name(monkeypatch):
    assert internals.has_fused_attention(zoo.tiny("olmoe"))
    assert not internals.has_fused_attention(zoo.tiny("gpt_oss"))  # plain, with sinks
    assert not internals.has_fused_attention(zoo.tiny("deepseek_v32"))  # its indexer asks
    monkeypatch.setattr(internals.inspect, "getsource", lambda module: (_ for _ in ()).throw(OSError()))
    assert not internals.has_fused_attention(zoo.tiny("olmoe"))


def test_whole_layers_are_those_that_can_be_made_again():
    model = tiny_model()
    assert internals.whole_layers(model) == [*model.model.layers] and internals.whole_layers(nn.Linear(1, 1)) == []


def test_plain_attention_stands_beside_a_models_own():
    model = zoo.tiny("olmoe")
    attention = model.model.layers[0].self_attn
    query, key, value = (torch.randn(1, 4, 3, 8) for _ in range(3))
    out, _ = internals.plain_attention(attention)(attention, query, key, value, None, scaling=0.5)
    expected = torch.softmax(0.5 * query @ key.transpose(2, 3), -1) @ value
    torch.testing.assert_close(out, expected.transpose(1, 2))
    assert internals.plain_attention(torch.nn.Linear(1, 1)) is None


@pytest.mark.parametrize("family", FLAGS)
def test_what_stacked_experts_say_of_themselves(family: str):
    model = zoo.tiny(family)
    experts = next(module for module in model.modules() if internals.is_marked(module))
    gated, transposed, biased, function, norm = FLAGS[family]
    assert internals.has_gate(experts) is gated
    assert internals.is_transposed(experts) is transposed
    assert internals.has_bias(experts) is biased
    assert callable(internals.between_projections(experts)) is function
    assert isinstance(internals.output_norm(experts), nn.Module) is norm
    assert internals.is_expert_parallel(experts) is False
    experts._is_expert_parallel = True
    assert internals.is_expert_parallel(experts) is True
    count, experts.num_experts = experts.num_experts, 1  # a rank's own
    assert internals.number_of_experts(experts) == count


def test_a_module_without_marks_is_told_by_its_parameters():
    module = nn.Module()
    assert not internals.is_marked(module) and not internals.has_gate(module) and not internals.is_transposed(module)
    assert internals.between_projections(module) is internals.output_norm(module) is None
    assert internals.is_expert_parallel(module) is internals.has_bias(module) is False
    module.act_fn = nn.ReLU()
    assert internals.between_projections(module) is module.act_fn
    module.gate_up_proj = nn.Parameter(torch.zeros(1))
    assert internals.has_gate(module) and internals.between_projections(module) is None


def test_conversions_turn_a_models_tensors_into_the_checkpoints_even_where_those_have_its_shape():
    model = zoo.tiny("mixtral")
    name = "model.layers.1.mlp.experts.down_proj"
    expected = {f"model.layers.1.block_sparse_moe.experts.{e}.w2.weight" for e in range(8)}
    value = torch.randn(8, 32, 24)
    for swapped in (False, True):
        if swapped:
            esft.swap(model, ExpertSelection({}))
        found = internals.revert(model, internals.conversions(model), {name: value})
        assert found.keys() == expected
        assert torch.equal(torch.stack([found[key] for key in sorted(found)]), value)


@pytest.mark.parametrize("family", ["deepseek_v2", "qwen3_moe"])
def test_a_model_is_loaded_but_for_what_is_taken_out_and_no_quantization_is_acted_on(family: str, tmp_path):
    stock, path = tiny_model(family), "model.layers.1.mlp.experts"
    stock.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    config.quantization_config = {"quant_method": "fp8"}

    def take_out(model: nn.Module) -> list[str]:
        assert all(p.is_meta for p in model.parameters())
        model.get_submodule("model.layers.1.mlp").experts = nn.Module()
        return [path]

    found = internals.load_in_part(type(stock), str(tmp_path), config, take_out)
    expected = {name: tensor for name, tensor in stock.state_dict().items() if not name.startswith(f"{path}.")}
    assert found.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.state_dict().items())
    assert not {"quantization_config", "_is_quantized"} & vars(found.config).keys()
    assert not hasattr(found, "hf_quantizer") and not found.training
    assert config.quantization_config == {"quant_method": "fp8"}


def test_a_loaded_models_conversions_are_those_of_its_files_unless_they_held_its_own_tensors_or_few_bits(tmp_path):
    def patterns(conversions: list) -> list[tuple]:
        return [(list(c.source_patterns), list(c.target_patterns)) for c in conversions]

    stock = zoo.tiny("mixtral")
    family = patterns(internals.conversions(stock))
    for original in (True, False):
        stock.save_pretrained(tmp_path / str(original), save_original_format=original)
        loaded = type(stock).from_pretrained(tmp_path / str(original))
        found = internals.conversions(loaded)
        assert (found is loaded._weight_conversions) is original
        assert original or patterns(found) == family
    few_bits = SimpleNamespace(
        operations=[SimpleNamespace(hf_quantizer=None)], source_patterns=["a"], target_patterns=["b"]
    )
    for others in ([], [SimpleNamespace(operations=[object()], source_patterns=["c"], target_patterns=["d"])]):
        loaded._weight_conversions = [*others, few_bits]
        assert patterns(internals.conversions(loaded)) == family


@pytest.mark.parametrize("known", [None, ["a"]])
def test_what_a_class_passes_over_of_its_files_it_goes_on_to_pass_over(known: list[str] | None):
    loader = SimpleNamespace(quantization_config=SimpleNamespace(take_out=lambda model: ["x.y"]))
    model = SimpleNamespace(_keys_to_ignore_on_load_unexpected=known)
    internals._Loader._process_model_before_weight_loading(loader, model)
    assert model._keys_to_ignore_on_load_unexpected == {*(known or ()), r"^(.*\.)?x\.y\.", "_scale_inv$"}


def test_a_prefix_that_only_some_files_have_is_none_of_a_familys_conversions(monkeypatch):
    prefix, renaming = (object.__new__(kind) for kind in (internals.PrefixChange, internals.WeightRenaming))
    of_family = {True: [], False: [prefix, renaming]}
    monkeypatch.setattr(internals, "get_model_conversion_mapping", lambda _, add_legacy=True: of_family[add_legacy])
    assert internals.conversions(SimpleNamespace(state_dict=dict)) == [renaming]


def test_marks_of_a_chat_template_are_places_in_the_text_that_it_renders():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{{ tools[0].name }}{{ mood }}{{ eos_token }}{% for m in messages %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{{ m.name }},{% endfor %}"
    )
    messages = [{"role": "user", "content": "ab", "name": None}, {"role": "user", "content": "c"}]
    found = internals.render_with_marks(tokenizer, messages, [{"name": "t"}], {"mood": "u"})
    assert found == ("tu<|end|>ab,c,", [(9, 11), (12, 13)])


def test_what_is_not_saved_is_told_by_the_models_class():
    model = tiny_model("olmoe")
    assert internals.names_not_saved(model) == []
    model._keys_to_ignore_on_save = {"head.position_ids"}
    assert internals.names_not_saved(model) == ["head.position_ids"]


@pytest.mark.parametrize("name", ["activation_checkpointing_enable", "gradient_checkpointing_enable"])
def test_layers_are_made_again_by_whatever_name_the_version_has_for_it(name: str):
    asked: list[dict] = []
    model: Any = SimpleNamespace(**{name: asked.append})
    recompute_layers_of(model)
    assert asked == [{"use_reentrant": False}]


def test_layers_are_made_again_without_a_warning():
    model = tiny_model()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        recompute_layers_of(model)
    assert all(getattr(layer, "gradient_checkpointing", False) for layer in whole_layers(model))

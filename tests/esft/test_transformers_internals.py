"""All that is used of transformers beyond its documentation is in one module, and was tried with named versions."""

import ast
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

import esft
from esft import transformers_internals as internals
from esft.selection import ExpertSelection
from tests.esft import zoo
from tests.esft.models import tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[2]
OTHERS = [path for path in sorted((ROOT / "esft").rglob("*.py")) if path.name != "transformers_internals.py"]
OF_PYTORCH = {"_modules"}


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
    tied = tiny_model(tie_word_embeddings=True)
    assert internals.tied_names(tied) == {"lm_head.weight": "model.embed_tokens.weight"}
    assert internals.has_peft_adapter(model) is False and internals.is_spread(model) is False
    model.save_pretrained(tmp_path)
    assert internals.base_name(type(model).from_pretrained(tmp_path)) == str(tmp_path)
    model._hf_peft_config_loaded = True
    model.config.distributed_config = object()
    assert internals.has_peft_adapter(model) is True and internals.is_spread(model) is True
    with torch.device("meta"):
        assert all(p.is_meta for p in internals.without_weights(type(model), tiny_model().config).parameters())


FLAGS = {  # gated, transposed, biased, a function of its own, a norm
    "deepseek_v2": (True, False, False, True, False),
    "gpt_oss": (True, True, True, True, False),
    "nemotron_h": (False, False, False, True, False),
    "muse_spark": (True, False, False, True, True),
}


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


def test_a_module_without_marks_is_told_by_its_parameters():
    module = nn.Module()
    assert not internals.is_marked(module) and not internals.has_gate(module) and not internals.is_transposed(module)
    assert internals.between_projections(module) is internals.output_norm(module) is None
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


def test_marks_of_a_chat_template_are_places_in_the_text_that_it_renders():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{{ tools[0].name }}{{ mood }}{{ eos_token }}{% for m in messages %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{{ m.name }},{% endfor %}"
    )
    messages = [{"role": "user", "content": "ab", "name": None}, {"role": "user", "content": "c"}]
    found = internals.render_with_marks(tokenizer, messages, [{"name": "t"}], {"mood": "u"})
    assert found == ("tu<|end|>ab,c,", [(9, 11), (12, 13)])

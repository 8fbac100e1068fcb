"""Models whose experts lie in a text model beside a tower for images; of qwen3_vl_moe, in both forms of its files.

The hub's files have its experts transposed, under the names that transformers' own files have too: the shape alone
tells which of the two they are.
"""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

import esft
from esft.checkpoint.digest import model_digest
from esft.checkpoint.folder import Checkpoint
from esft.selection import ExpertSelection
from tests.esft.experts import test_moe_layers as families

SELECTION = ExpertSelection({0: [3], 1: [5, 0]}, non_expert_modules=True)
_VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}


def tiny(tie: bool = False) -> PreTrainedModel:
    text = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 24, "moe_intermediate_size": 12, "head_dim": 8,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "num_experts": 8,
        "num_experts_per_tok": 2, "tie_word_embeddings": tie,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
    }  # fmt: skip
    torch.manual_seed(0)
    vision = _VISION | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    config = Qwen3VLMoeConfig(text_config=text, vision_config=vision, tie_word_embeddings=tie)
    return Qwen3VLMoeForConditionalGeneration(config).eval()


def load(folder) -> PreTrainedModel:
    return Qwen3VLMoeForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


def as_on_the_hub(folder) -> None:
    file = folder / "model.safetensors"
    transposed = {n: t.mT.contiguous() if "mlp.experts." in n else t for n, t in load_file(file).items()}
    save_file(transposed, file, {"format": "pt"})


@pytest.mark.parametrize("form", ["hub", "transformers"])
@pytest.mark.parametrize("tie", [False, True])
def test_both_forms_of_a_base_give_the_same_adapter_and_keep_their_form_when_merged(tmp_path, form: str, tie: bool):
    tiny(tie).save_pretrained(tmp_path / "base")
    if form == "hub":
        as_on_the_hub(tmp_path / "base")
    model = load(tmp_path / "base")
    assert Checkpoint.open(tmp_path / "base").digest() == model_digest(model) == model_digest(tiny(tie))

    families.tune(esft.swap(model, SELECTION))
    esft.save_adapter(model, tmp_path / "a")
    slices = {n: tuple(t.shape) for n, t in load_file(tmp_path / "a" / "adapter.safetensors").items()}
    assert slices["model.language_model.layers.1.mlp.experts.5.gate_up_proj"] == (32, 24)
    esft.merge(tmp_path / "base", tmp_path / "a", tmp_path / "merged")
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("base", "merged"))
    assert {n: t.shape for n, t in before.items()} == {n: t.shape for n, t in after.items()}

    expected = esft.unswap(model).state_dict()
    for found in (load(tmp_path / "merged"), esft.load_adapter(tiny(tie), tmp_path / "a")):
        state = found.state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("form", ["hub", "transformers"])
def test_what_is_saved_swapped_is_the_stock_models_and_a_swapped_model_reads_either_form(tmp_path, form: str):
    model, other = (esft.swap(tiny(), SELECTION) for _ in range(2))
    families.tune(model)
    model.save_pretrained(tmp_path / "swapped")
    content = (tmp_path / "swapped" / "model.safetensors").read_bytes()
    if form == "hub":
        as_on_the_hub(tmp_path / "swapped")
    other.load_state_dict(load_file(tmp_path / "swapped" / "model.safetensors"))
    esft.unswap(model).save_pretrained(tmp_path / "stock")
    assert content == (tmp_path / "stock" / "model.safetensors").read_bytes()
    expected = model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in esft.unswap(other).state_dict().items())

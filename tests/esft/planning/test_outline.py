import pytest
import torch
from transformers import LlamaConfig

import esft
from esft.checkpoint.load import load_skeleton
from esft.experts.moe_layers import stock_weights
from esft.planning.outline import outline, require_beside, skeleton_of
from tests.esft import test_multimodal as multimodal
from tests.esft.models import FAMILIES, tiny_model


@pytest.fixture(params=["deepseek_v2", "qwen2_moe", "mixtral", "gpt_oss"])
def folder(request, tmp_path):
    """A folder with a configuration alone, and the model of it."""
    if request.param in FAMILIES:
        model = tiny_model(request.param)
    else:
        from tests.esft.zoo import tiny

        model = tiny(request.param)
    model.config.save_pretrained(tmp_path)
    return str(tmp_path), model


def test_a_model_is_counted_without_its_weights(folder):
    path, model = folder
    found, weights = outline(path), stock_weights(model)
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.shared == sum(w.numel() for w in weights.shared.values())
    assert found.others == sum(w.numel() for w in weights.others.values())
    assert {layer.index: layer.experts for layer in found.layers} == weights.num_experts
    for layer in found.layers:
        one = weights.experts[layer.index].weights(0).values()
        assert layer.expert_size == sum(w.numel() for w in one) and layer.biased == (len(one) > 2)
        g, d, f = layer.shape
        assert (d, g) == (32, 2 * f) and model.get_submodule(layer.name) is not None


def test_beside_a_tower_for_images_a_token_has_as_many_experts_as_the_text_model_says(tmp_path, monkeypatch):
    model = multimodal.tiny().to("meta")
    model.config.save_pretrained(tmp_path)
    monkeypatch.setattr("esft.planning.outline.skeleton_of", lambda *_: model)
    assert outline(str(tmp_path)).top_k == model.config.get_text_config().num_experts_per_tok == 2


def test_the_dtype_is_the_checkpoints_or_the_one_asked_for(tmp_path):
    config = tiny_model().config
    config.dtype = torch.bfloat16
    config.save_pretrained(tmp_path)
    assert skeleton_of(str(tmp_path), "float32").dtype == outline(str(tmp_path), "float32").dtype == torch.float32
    assert outline(str(tmp_path), "bfloat16").dtype == torch.bfloat16


def test_auto_is_what_this_machine_computes_the_checkpoint_in(tmp_path, monkeypatch):
    config = tiny_model().config
    config.dtype = torch.bfloat16
    config.save_pretrained(tmp_path)
    for found, expected in (("auto", torch.bfloat16), ("float32", torch.float32)):
        monkeypatch.setattr("esft.planning.outline.compute_dtype", lambda asked, found=found: found)
        assert skeleton_of(str(tmp_path)).dtype == expected


def test_no_code_of_a_checkpoint_is_run_unless_that_is_allowed(tmp_path, monkeypatch):
    tiny_model().config.save_pretrained(tmp_path)
    asked, real = [], load_skeleton
    monkeypatch.setattr("esft.planning.outline.load_skeleton", lambda *how: asked.append(how[1]) or real(*how))
    skeleton_of(str(tmp_path))
    outline(str(tmp_path))
    outline(str(tmp_path), trust_remote_code=True)
    assert asked == [False, False, True]


def test_what_is_beside_routed_experts_requires_gradients_as_asked(tmp_path):
    tiny_model().config.save_pretrained(tmp_path)
    found = outline(str(tmp_path))
    for shared in (False, True):
        for others in (False, True):
            skeleton = skeleton_of(str(tmp_path))
            require_beside(skeleton, shared, others)
            trained = sum(p.numel() for p in skeleton.parameters() if p.requires_grad)
            assert trained == found.shared * shared + found.others * others


def test_a_folder_without_a_model_of_experts_is_named(tmp_path):
    with pytest.raises(esft.InputError, match="no config.json"):
        outline(str(tmp_path))
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaConfig(**sizes).save_pretrained(tmp_path)
    with pytest.raises(esft.InputError, match="has no MoE layers"):
        outline(str(tmp_path))


def test_weights_quantized_in_a_way_that_is_not_read_are_refused(tmp_path):
    config = tiny_model().config
    for method in ("fp8", "gptq"):
        config.quantization_config = {"quant_method": method, "weight_block_size": [128, 128]}
        config.save_pretrained(tmp_path / method)
    assert outline(str(tmp_path / "fp8")).layers and outline(str(tmp_path / "fp8")).shipped == "fp8"
    with pytest.raises(esft.InputError, match="gptq: weights quantized by 'gptq' are not supported"):
        outline(str(tmp_path / "gptq"))


def test_a_configuration_that_has_changed_is_read_again_and_one_that_has_not_is_not(tmp_path, monkeypatch):
    read, real = [], load_skeleton
    monkeypatch.setattr("esft.planning.outline.load_skeleton", lambda *how: read.append(how) or real(*how))
    for vocabulary, times in ((300, 1), (300, 1), (340, 2), (300, 2)):
        tiny_model(vocab_size=vocabulary).config.save_pretrained(tmp_path)
        assert outline(str(tmp_path)).others == tiny_outline(vocabulary)
        assert len(read) == times


def tiny_outline(vocabulary: int) -> int:
    model = tiny_model(vocab_size=vocabulary)
    return sum(weight.numel() for weight in stock_weights(model).others.values())

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import esft
from esft.checkpoint import Checkpoint, load_model, load_tokenizer, model_digest
from tests.esft.models import FAMILIES, save_tiny, tiny_model


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_files_and_the_model_loaded_in_any_dtype_have_one_digest(tmp_path, family: str, stored: torch.dtype):
    base = save_tiny(tmp_path / "base", family, dtype=stored)
    digest = Checkpoint.open(base).digest()
    for dtype in ("float32", "bfloat16"):
        assert model_digest(load_model(str(base), dtype)) == digest


PARTS = """embed_tokens self_attn.q_proj self_attn.kv_b_proj mlp.gate.weight experts.gate_up_proj experts.down_proj
shared_experts.up_proj norm.weight lm_head""".split()


@pytest.mark.parametrize("part", PARTS)
def test_a_model_that_differs_in_any_part_has_another_digest(part: str):
    model = tiny_model()
    before = model_digest(model)
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if part in name).mul_(1.5)
    assert model_digest(model) != before


def test_extra_prediction_layers_do_not_count(tmp_path):
    base = save_tiny(tmp_path / "base")
    digest = Checkpoint.open(base).digest()
    tensors = load_file(base / "model.safetensors")
    extra = {name.replace("layers.2.", "layers.3."): t.clone() for name, t in tensors.items() if "layers.2." in name}
    save_file(tensors | extra, base / "model.safetensors", {"format": "pt"})
    assert extra and Checkpoint.open(base).digest() == digest


def lose_a_tensor(base):
    tensors = load_file(base / "model.safetensors")
    del tensors["model.layers.0.self_attn.o_proj.weight"]
    save_file(tensors, base / "model.safetensors", {"format": "pt"})


def truncate(base):
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lose_a_tensor, "tensor model.layers.0.self_attn.o_proj.weight is missing"),
        (truncate, "cannot load a model"),
        (lambda base: (base / "config.json").write_text("{"), "cannot load a model"),
        (lambda base: (base / "config.json").unlink(), "cannot load a model"),
    ],
    ids=["missing tensor", "truncated", "broken config", "no config"],
)
def test_a_damaged_model_is_refused(tmp_path, damage, message: str):
    base = save_tiny(tmp_path / "base")
    damage(base)
    with pytest.raises(esft.InputError, match=message):
        load_model(str(base))


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("config.json", "{", "not a model's configuration"),
        ("config.json", '{"model_type": "unheard_of"}', "not a model's configuration"),
        ("model.safetensors.index.json", "{}", "has no weight_map"),
        ("model.safetensors", "nonsense", "not a readable safetensors file"),
    ],
)
def test_a_damaged_folder_is_refused(tmp_path, file: str, text: str, message: str):
    base = save_tiny(tmp_path / "base")
    (base / file).write_text(text)
    with pytest.raises(esft.InputError, match=message):
        Checkpoint.open(base)


def test_a_tokenizer_without_a_chat_template_is_refused(tmp_path):
    base = save_tiny(tmp_path / "base")
    (base / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((base / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(esft.InputError, match="no chat template"):
        load_tokenizer(str(base))
    with pytest.raises(esft.InputError, match="cannot load a tokenizer"):
        load_tokenizer(str(tmp_path / "absent"))


def test_further_prediction_layers_are_no_weights_of_the_model_but_those_of_another_tower_are(tmp_path):
    from esft.checkpoint import Checkpoint

    base = Checkpoint.open(save_tiny(tmp_path / "base"))  # three layers
    names = {"model.layers.3.mlp.experts.0.up_proj.weight": "", "vision_tower.layers.7.attn.weight": ""}
    checkpoint = Checkpoint(base.folder, base.files | names, base.config)
    assert not checkpoint.belongs("model.layers.3.mlp.experts.0.up_proj.weight")
    assert checkpoint.belongs("model.layers.2.mlp.experts.0.up_proj.weight")
    assert checkpoint.belongs("vision_tower.layers.7.attn.weight")
    assert not checkpoint.belongs("model.rotary_emb.inv_freq")

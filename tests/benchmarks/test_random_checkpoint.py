import json

import torch
from safetensors import safe_open

from benchmarks import random_checkpoint
from benchmarks.random_checkpoint import write_checkpoint
from esft.checkpoint.folder import Checkpoint
from esft.checkpoint.load import load_model, load_tokenizer
from tests.esft.models import tiny_model


def small(tmp_path, monkeypatch, **sizes) -> None:
    """A model of the name "small" to write."""
    config = tiny_model(vocab_size=8192, **sizes).config
    config.architectures, config.dtype = ["DeepseekV2ForCausalLM"], "bfloat16"
    config.save_pretrained(tmp_path / "models" / "small")
    monkeypatch.setattr(random_checkpoint, "MODELS", tmp_path / "models")
    monkeypatch.setattr(random_checkpoint, "DRAWN", 1 << 14)


def test_it_loads_as_a_model_of_the_configurations_sizes(tmp_path, monkeypatch):
    small(tmp_path, monkeypatch)
    folder = write_checkpoint("small", tmp_path / "out")
    model = load_model(str(folder))
    assert load_tokenizer(str(folder)).chat_template
    shapes = {name: p.shape for name, p in tiny_model(vocab_size=8192).state_dict().items()}
    assert {name: p.shape for name, p in model.state_dict().items()} == shapes
    values = torch.cat([p.detach().float().view(-1) for n, p in model.named_parameters() if "norm" not in n])
    assert model.dtype == torch.bfloat16 and 0.018 < values.std() < 0.022
    experts = model.get_parameter("model.layers.1.mlp.experts.down_proj")
    assert not torch.equal(experts[0], experts[1])
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2 * sum(p.numel() for p in model.parameters())


def test_what_is_written_stays_and_what_is_missing_is_made_the_same(tmp_path, monkeypatch):
    small(tmp_path, monkeypatch)
    folder = write_checkpoint("small", tmp_path / "out")
    digest = Checkpoint.open(folder).digest()
    files = sorted(folder.glob("*.safetensors"))
    times = {file: file.stat().st_mtime_ns for file in files}
    write_checkpoint("small", folder)
    assert {file: file.stat().st_mtime_ns for file in files} == times
    files[1].unlink()
    (folder / "model.safetensors.index.json").unlink()
    write_checkpoint("small", folder)
    assert [file for file in files if file.stat().st_mtime_ns != times[file]] == [files[1]]
    assert Checkpoint.open(folder).digest() == digest
    with safe_open(files[0], "pt") as handle:
        assert handle.metadata() == {"format": "pt"}

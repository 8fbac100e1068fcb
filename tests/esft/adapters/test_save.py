import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

import esft
from esft.checkpoint.digest import forward_settings
from esft.checkpoint.folder import Checkpoint
from esft.checkpoint.load import load_model
from esft.selection import ExpertSelection
from tests.esft.adapters.tuned import logits, tuned
from tests.esft.models import FAMILIES, save_tiny, tiny_model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("into_swapped", [False, True])
def test_a_saved_adapter_gives_the_tuned_logits(tmp_path, family: str, into_swapped: bool):
    model = tuned(family)
    esft.save_adapter(model, tmp_path / "a")
    other = tiny_model(family)
    before = logits(other)
    if into_swapped:
        esft.swap(other, ExpertSelection({2: [7, 5]}))
    esft.load_adapter(other, tmp_path / "a")
    torch.testing.assert_close(logits(other), logits(model), atol=2e-6, rtol=1e-5)
    assert not torch.allclose(logits(other), before, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_tensor_names_are_those_of_the_checkpoint(tmp_path, family: str):
    base = save_tiny(tmp_path / "base", family)
    esft.save_adapter(tuned(family), tmp_path / "a")
    names = load_file(tmp_path / "a" / "adapter.safetensors").keys()
    assert len(names) == 9
    assert names <= load_file(base / "model.safetensors").keys()


def test_shared_experts_and_non_expert_modules_are_saved_when_selected(tmp_path):
    model = tuned(shared_experts=True, non_expert_modules=True)
    esft.save_adapter(model, tmp_path / "a")
    names = load_file(tmp_path / "a" / "adapter.safetensors").keys()
    assert {"model.layers.1.mlp.shared_experts.up_proj.weight", "model.norm.weight", "lm_head.weight"} <= names
    torch.testing.assert_close(logits(esft.load_adapter(tiny_model(), tmp_path / "a")), logits(model))


def test_a_trained_weight_that_lies_transposed_in_memory_is_saved_as_it_reads(tmp_path):
    model = tuned(non_expert_modules=True)
    model.lm_head.weight.data = model.lm_head.weight.data.T.contiguous().T
    esft.save_adapter(model, tmp_path / "a")
    assert torch.equal(load_file(tmp_path / "a" / "adapter.safetensors")["lm_head.weight"], model.lm_head.weight)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_folder_says_what_was_trained_from_what_and_how_it_was_chosen(tmp_path, dtype: str):
    base = save_tiny(tmp_path / "base")
    chosen = ExpertSelection({2: [5, 0], 1: [1]}, shared_experts=True, chosen_by={"by": "gate", "top_p": 0.25})
    model = esft.swap(load_model(str(base), dtype), chosen)
    folder = esft.save_adapter(model, str(tmp_path / "a"))
    assert folder == tmp_path / "a"
    assert sorted(path.name for path in folder.iterdir()) == ["adapter.safetensors", "expert_cfg.json", "manifest.json"]
    assert json.loads((folder / "manifest.json").read_text()) == {
        "format_version": 2,
        "base_model": str(base),
        "base_digest": Checkpoint.open(base).digest(),
        "base_dtype": dtype,
        "base_settings": forward_settings(model.config),
        "chosen_by": {"by": "gate", "top_p": 0.25},
        "frozen": "bf16",
        "frozen_linear": "bf16",
    }
    assert ExpertSelection.load(folder / "expert_cfg.json") == chosen
    with safe_open(folder / "adapter.safetensors", framework="pt") as handle:
        assert handle.metadata() == {"format": "pt"}  # what transformers asks of a file
        assert {handle.get_slice(name).get_dtype() for name in handle.keys()} == {  # noqa: SIM118
            {"float32": "F32", "bfloat16": "BF16"}[dtype]
        }


def test_a_disk_that_fails_leaves_no_file(tmp_path, monkeypatch):
    def fails(tensors, path, metadata):
        path.write_bytes(b"half")
        raise SafetensorError("I/O error")

    monkeypatch.setattr("esft.adapters.save.save_file", fails)
    with pytest.raises(esft.DiskError, match=r"/a: I/O error$"):
        esft.save_adapter(tuned(), tmp_path / "a")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [None, "a"])
def test_what_a_loaded_adapter_wrote_outside_the_selection_is_not_left_out_in_silence(tmp_path, name: str | None):
    esft.save_adapter(tuned(), tmp_path / "a")  # experts 5 and 0 of layer 2, 1 of layer 1
    model = esft.swap(tiny_model(), ExpertSelection({2: [5, 1], 1: [1]}))
    esft.load_adapter(model, tmp_path / "a", name)
    if name is not None:
        esft.save_adapter(model, tmp_path / "base")  # held, but not written yet
        esft.set_adapter(model, name)
    missing = r"model\.layers\.2\.mlp\.experts\.0\.down_proj\.weight"
    with pytest.raises(esft.InputError, match=rf"has changed {missing}, which is not in .* \(3 such in all\)"):
        esft.save_adapter(model, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_what_was_loaded_before_a_swap_is_of_its_base_and_need_not_be_saved_again(tmp_path):
    esft.save_adapter(tuned(), tmp_path / "a")
    model = esft.load_adapter(tiny_model(), tmp_path / "a")
    esft.swap(model, ExpertSelection({2: [7]}))
    esft.save_adapter(model, tmp_path / "b")
    assert len(load_file(tmp_path / "b" / "adapter.safetensors")) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.2.mlp.experts.5.up_proj.weight"), "experts.5.up_proj.weight is missing"),
        (lambda t: t.update({"model.extra.weight": torch.zeros(1)}), "model.extra.weight belongs to nothing selected"),
        (
            lambda t: t.update({"model.layers.2.mlp.experts.0.up_proj.weight": torch.zeros(20, 31)}),
            r"has shape \(20, 31\), the base has \(20, 32\)",
        ),
        (
            lambda t: t.update({"model.layers.2.mlp.experts.0.up_proj.weight": torch.ones(20, 32, dtype=torch.int8)}),
            "experts.0.up_proj.weight is I8, not floating point",
        ),
        (
            lambda t: t.update({"model.layers.2.mlp.experts.0.up_proj.weight": torch.ones(20, 32, dtype=torch.bool)}),
            "experts.0.up_proj.weight is BOOL, not floating point",
        ),
        (
            lambda t: t.update({"layers.2.mlp.experts.0.up_proj.weight": torch.zeros(20, 32)}),
            "holds tensor model.layers.2.mlp.experts.0.up_proj.weight twice",
        ),
    ],
)
def test_a_missing_extra_misshapen_integer_or_doubled_tensor_is_named(tmp_path, change, message: str):
    esft.save_adapter(tuned(), tmp_path / "a")
    path = tmp_path / "a" / "adapter.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    model = tiny_model()
    before = logits(model)
    with pytest.raises(esft.InputError, match=message):
        esft.load_adapter(model, tmp_path / "a")
    assert torch.equal(logits(model), before)


def test_a_truncated_file_and_a_pickle_are_refused(tmp_path):
    esft.save_adapter(tuned(), tmp_path / "a")
    path = tmp_path / "a" / "adapter.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(esft.InputError, match="not a readable safetensors file"):
        esft.load_adapter(tiny_model(), tmp_path / "a")
    torch.save({}, path)
    with pytest.raises(esft.InputError, match="not a readable safetensors file"):
        esft.load_adapter(tiny_model(), tmp_path / "a")


def test_an_unknown_format_and_an_incomplete_folder_are_refused(tmp_path):
    esft.save_adapter(tuned(), tmp_path / "a")
    (tmp_path / "a" / "manifest.json").write_text(json.dumps({"format_version": 99}))
    with pytest.raises(esft.InputError, match="format_version must be 1 or 2, got 99"):
        esft.load_adapter(tiny_model(), tmp_path / "a")
    (tmp_path / "a" / "expert_cfg.json").unlink()
    with pytest.raises(esft.InputError, match="no expert_cfg.json"):
        esft.load_adapter(tiny_model(), tmp_path / "a")


def test_a_folder_in_use_and_a_stock_model_are_refused(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "precious").write_text("keep")
    with pytest.raises(esft.InputError, match="holds something already"):
        esft.save_adapter(tuned(), tmp_path / "a")
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["precious"]
    with pytest.raises(esft.InputError, match="holds no earlier adapter"):
        esft.save_adapter(tuned(), tmp_path / "a", overwrite=True)
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["precious"]
    for overwrite in (False, True):
        esft.save_adapter(tuned(), tmp_path / "c", overwrite)
    (tmp_path / "c" / "precious").write_text("keep")
    with pytest.raises(esft.InputError, match="c: holds precious, which is no part of what is overwritten; move it"):
        esft.save_adapter(tuned(), tmp_path / "c", overwrite=True)
    assert (tmp_path / "c" / "precious").read_text() == "keep"
    (tmp_path / "c" / "precious").unlink()
    (tmp_path / "c" / "manifest.json").write_text('{"format_version": 3}')
    with pytest.raises(esft.InputError, match=r"c/manifest.json: format_version must be 1 or 2, got 3"):
        esft.save_adapter(tuned(), tmp_path / "c", overwrite=True)
    with pytest.raises(esft.InputError, match="only a swapped model"):
        esft.save_adapter(tiny_model(), tmp_path / "b")


def test_a_model_whose_weights_are_elsewhere_is_refused(tmp_path):
    esft.save_adapter(tuned(), tmp_path / "a")
    model = tiny_model()
    model.model.embed_tokens.to("meta")
    for touch in (lambda: esft.load_adapter(model, tmp_path / "a"), lambda: esft.swap(model, ExpertSelection({}))):
        with pytest.raises(esft.InputError, match="embed_tokens.weight: the weights are not in memory"):
            touch()


def test_what_another_library_put_into_trained_modules_is_not_saved_as_theirs(tmp_path):
    model = tuned(non_expert_modules=True)
    both = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(esft.InputError, match=r"q_proj\.base_layer\.weight: is not of the model that was swapped"):
        esft.save_adapter(model, tmp_path / "a")
    both.unload()
    esft.save_adapter(model, tmp_path / "a")
    torch.testing.assert_close(logits(esft.load_adapter(tiny_model(), tmp_path / "a")), logits(model))


def test_a_wrapped_model_is_refused(tmp_path):
    esft.save_adapter(tuned(), tmp_path / "a")
    compiled = torch.compile(tuned(), backend="eager")
    for touch in (
        lambda: esft.save_adapter(compiled, tmp_path / "b"),
        lambda: esft.load_adapter(compiled, tmp_path / "a"),
        lambda: esft.set_adapter(compiled, "a"),
    ):
        with pytest.raises(esft.InputError, match="OptimizedModule is no transformers model; .* unwrapped"):
            touch()
    assert not (tmp_path / "b").exists()


def save_small(folder, dtype: torch.dtype):
    """A base whose values are so small that float16 does not keep all of their bits."""
    model = tiny_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1e-3)
    model.to(dtype).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("trained", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_an_adapter_trained_in_another_dtype_fits_its_base(tmp_path, stored: torch.dtype, trained: str):
    base = save_small(tmp_path / "base", stored)
    model = esft.swap(load_model(str(base), trained), ExpertSelection({1: [0]}))
    esft.save_adapter(model, tmp_path / "a")
    esft.load_adapter(load_model(str(base)), tmp_path / "a")
    esft.load_adapter(load_model(str(base)), tmp_path / "a", name="a")
    esft.merge(base, tmp_path / "a", tmp_path / "merged")

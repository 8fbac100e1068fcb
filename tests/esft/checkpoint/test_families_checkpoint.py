"""Checkpoints and adapters of every family that transformers gives the experts interface."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from transformers.core_model_loading import revert_weight_conversion

import esft
from esft.experts.moe_layers import moe_layers
from esft.storage.files import safetensors_header
from tests.esft import zoo
from tests.esft.experts.test_moe_layers import FAMILIES, close, output, selection, swapped, tune, with_all_else


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_checkpoint_loads_in_transformers_with_the_bases_names_and_shapes(family: str, tmp_path):
    cls = zoo.model_class(family)
    zoo.tiny(family).save_pretrained(tmp_path / "base")
    model = cls.from_pretrained(tmp_path / "base").eval()
    chosen = selection(model)
    swapped(model, chosen)
    tune(model)
    tuned = output(model)
    esft.save_adapter(model, tmp_path / "a")
    esft.merge(tmp_path / "base", tmp_path / "a", tmp_path / "merged")
    merged, info = cls.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert close(output(merged.eval()), tuned)
    headers = [safetensors_header(tmp_path / f / "model.safetensors") for f in ("base", "merged")]
    assert headers[0] == headers[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_shared_experts_and_non_expert_modules_merge_to_the_tuned_models_weights(family: str, tmp_path):
    cls = zoo.model_class(family)
    zoo.tiny(family).save_pretrained(tmp_path / "base")
    model = cls.from_pretrained(tmp_path / "base")
    chosen = with_all_else(model)
    swapped(model, chosen)
    tune(model)
    esft.save_adapter(model, tmp_path / "a")
    esft.merge(tmp_path / "base", tmp_path / "a", tmp_path / "merged")
    merged, info = cls.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    expected, base = esft.unswap(model).state_dict(), zoo.tiny(family)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in merged.state_dict().items())
    routed = {p for layer in moe_layers(base) for p in layer.parameters}
    assert not any(torch.equal(p, expected[name]) for name, p in base.named_parameters() if p not in routed)
    headers = [safetensors_header(tmp_path / f / "model.safetensors") for f in ("base", "merged")]
    assert headers[0] == headers[1]
    esft.load_adapter(base, tmp_path / "a")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in base.state_dict().items())


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_holds_the_checkpoints_tensors_and_brings_the_tuned_model_back(family: str, tmp_path):
    model, other = zoo.tiny(family), zoo.tiny(family)
    chosen = selection(model)
    stock_names = [name for name, _ in model.named_parameters()]
    swapped(model, chosen)
    tune(model)
    tuned = output(model)
    esft.save_adapter(model, tmp_path / "a")
    before = output(other)
    esft.load_adapter(other, tmp_path / "a")
    assert close(output(other), tuned)
    assert not close(before, tuned)
    esft.unswap(model)
    assert [name for name, _ in model.named_parameters()] == stock_names
    assert close(output(model), tuned)
    # The same tensors are in the checkpoint that transformers itself would write of the tuned model.
    written = revert_weight_conversion(model, copy.copy(model.state_dict()))
    for name, tensor in load_file(tmp_path / "a" / "adapter.safetensors").items():
        if name in written:
            assert torch.equal(written[name], tensor)
        else:  # a slice of a stacked tensor, whose name lacks the expert's number
            parts = name.split(".")
            numbers = [i for i, part in enumerate(parts) if part.isdecimal()]
            stacked = written[".".join(p for i, p in enumerate(parts) if i != numbers[-1])]
            assert torch.equal(stacked[int(parts[numbers[-1]])], tensor)


FORMS = ["mixtral", "granitemoe", "kimi_linear", "laguna", "gpt_oss", "nemotron_h"]


@pytest.mark.parametrize("family", FORMS)
def test_a_base_that_holds_tensors_as_the_model_does_has_the_same_digest_adapters_and_weights(family: str, tmp_path):
    cls = zoo.model_class(family)
    zoo.tiny(family).save_pretrained(tmp_path / "original")
    zoo.tiny(family).save_pretrained(tmp_path / "own", save_original_format=False)
    adapters, merged = {}, {}
    for form in ("original", "own"):
        model = cls.from_pretrained(tmp_path / form)
        chosen = with_all_else(model)
        swapped(model, chosen)
        tune(model)
        adapters[form] = load_file(esft.save_adapter(model, tmp_path / f"a-{form}") / "adapter.safetensors")
        esft.merge(tmp_path / form, tmp_path / "a-original", tmp_path / f"merged-{form}")
        merged[form], info = cls.from_pretrained(tmp_path / f"merged-{form}", output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        headers = [safetensors_header(tmp_path / f / "model.safetensors") for f in (form, f"merged-{form}")]
        assert headers[0] == headers[1]
        expected = esft.unswap(model).state_dict()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in merged[form].state_dict().items())
    assert all(torch.equal(adapters["own"][name], tensor) for name, tensor in adapters["original"].items())
    esft.load_adapter(cls.from_pretrained(tmp_path / "original"), tmp_path / "a-own")  # so it is the same base
    if family != "gpt_oss":  # whose two forms are one
        assert adapters["own"].keys() - safetensors_header(tmp_path / "own" / "model.safetensors").keys()

"""Every family that transformers gives the experts interface: swapped, it computes what the stock model does."""

import copy
import re
import warnings
from pathlib import Path

import pytest
import torch
from esft.data import IGNORE
from esft.evaluate import batch_loss
from esft.families import MoELayer, moe_layers, routed_parameters
from esft.layout import read_layout
from esft.select import ExpertSelection
from safetensors.torch import load_file
from transformers.core_model_loading import revert_weight_conversion

import esft
from esft.files import safetensors_header
from esft.moe import PROJECTIONS
from tests.esft import zoo

# Families that cannot be built and run here, with the reason; none of them may be runnable.
UNBUILDABLE = {
    "qwen3_omni_moe:Qwen3OmniMoeTalkerTextExperts": "its forward looks for embed_tokens, which the model does not have",
}
FAMILIES = sorted(set(zoo.families()) - set(UNBUILDABLE))
# What the kernels cannot fuse: an activation of two arguments, a norm after each expert.
PLAIN = {"inkling2", "muse_spark"}
# What routers apply to their logits, as their code says; all others a softmax.
SIGMOID = """afmoe axk1 axk2 bailing_hybrid beam deepseek_v3 deepseek_v32 dots1 dots3_note exaone_moe flint glm4_moe
glm4_moe_lite glm4v_moe glm5_next glm_moe_dsa hy_v3 hy_v4 inkling inkling2 kimi_linear kolibri1 laguna lfm2_moe
mimo_v2_flash minimax_m2 minimax_m3_vl muse_spark nemotron_h solar_open""".split()


def output(model) -> torch.Tensor:
    """Logits, or the last hidden states of a model without a head."""
    out = model(input_ids=zoo.tokens(), use_cache=False)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


def backward(out: torch.Tensor) -> None:
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(2))).mean().backward()


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((found - expected).abs().max() <= 2e-5 * expected.abs().max())


def selection(model) -> ExpertSelection:
    """Three experts of the first MoE layer, one of the last, none of any other."""
    layers = moe_layers(model)
    return ExpertSelection({layers[0].index: [5, 0, 2], layers[-1].index: [1]})


def swapped(model, chosen: ExpertSelection, backend: str = "auto"):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return esft.swap(model, chosen, backend)


def tune(model) -> None:
    """Move everything that trains."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)


def names_of(layer: MoELayer) -> tuple[str, ...]:
    return read_layout(layer.experts, layer.name).names


def test_every_family_is_tested_or_listed_with_a_reason():
    assert len(FAMILIES) >= 60
    assert set(UNBUILDABLE) <= set(zoo.families())
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    assert {family.partition(":")[0] for family in zoo.families()} <= set(re.findall(r"\w+", readme))
    for family in UNBUILDABLE:
        with pytest.raises(Exception):  # noqa: B017 (whatever stands in the way; the list says what)
            output(zoo.tiny(family))


# One family for each way that the weights lie and each activation, through the Triton kernels.
TRITON = ["aria", "deepseek_v4", "gemma4", "gpt_oss", "mixtral", "nemotron_h", "openai_privacy_filter"]


@pytest.mark.parametrize(("family", "backend"), [*((f, "auto") for f in FAMILIES), *((f, "triton") for f in TRITON)])
def test_logits_and_gradients_of_the_selected_experts_equal_the_stock_models(family: str, backend: str):
    stock, ours = zoo.tiny(family), zoo.tiny(family)
    stock.set_experts_implementation("eager")
    chosen = selection(stock)
    swapped(ours, chosen, backend)
    assert zoo.families()[family] in {type(layer.experts).__name__ for layer in moe_layers(stock)}
    expected, found = output(stock), output(ours)
    assert expected.isfinite().all()
    assert close(found, expected)
    backward(expected)
    backward(found)
    reached = False
    for their, our in zip(moe_layers(stock), moe_layers(ours), strict=True):
        ids = chosen.experts.get(our.index, [])
        for name, own in zip(names_of(their), PROJECTIONS, strict=False):
            gradient, trained = getattr(their.experts, name).grad, getattr(our.experts, f"trained_{own}")
            if gradient is None or not ids:
                assert trained.grad is None or not trained.grad.count_nonzero()
                continue
            assert close(trained.grad, gradient[ids])
            reached |= bool(gradient[ids].count_nonzero())
    assert reached
    assert all(".trained_" in n for n, p in ours.named_parameters() if p.grad is not None and p.numel())


@pytest.mark.parametrize("family", FAMILIES)
def test_only_what_the_kernels_cannot_fuse_runs_through_plain_pytorch_and_says_so_once(family: str):
    model = zoo.tiny(family)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        esft.swap(model, selection(model))
    said = [str(w.message) for w in said if "the kernels do not compute" in str(w.message)]
    assert len(said) == (family in PLAIN)


@pytest.mark.parametrize("family", FAMILIES)
def test_as_an_experts_implementation_it_gives_the_eager_logits_and_gradients_of_all_experts(family: str):
    stock, ours = zoo.tiny(family), zoo.tiny(family)
    stock.set_experts_implementation("eager")
    ours.set_experts_implementation("esft")
    expected, found = output(stock), output(ours)
    assert close(found, expected)
    backward(expected)
    backward(found)
    for their, our in zip(moe_layers(stock), moe_layers(ours), strict=True):
        for name in names_of(their):
            gradient = getattr(their.experts, name).grad
            assert gradient is None or close(getattr(our.experts, name).grad, gradient)


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_agree_with_a_count_by_hand(family: str):
    model = zoo.tiny(family)
    batch = {"input_ids": zoo.tokens(), "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    seen: dict[int, list] = {}
    hooks = []
    for layer in moe_layers(model):
        record = seen.setdefault(layer.index, [])
        hooks.append(layer.router.register_forward_hook(lambda _, __, out, r=record: r.append(router_logits(out))))
        hooks.append(layer.experts.register_forward_pre_hook(lambda _, args, r=record: r.extend(args[1:])))
    with torch.no_grad():
        model.base_model(**batch, use_cache=False)
    for hook in hooks:
        hook.remove()
    scores = esft.score_experts(model, [batch])
    for layer in moe_layers(model):
        if not seen[layer.index]:  # experts of images, which saw no token
            assert layer.index not in scores.token_scores
            continue
        logits, index, weights = seen[layer.index]
        tokens, gates, rows = [0.0] * 8, [0.0] * 8, 0
        for t, values in enumerate(gate_values(family, logits.reshape(18, -1)).tolist()):
            for expert, weight in zip(index[t].tolist(), weights[t].tolist(), strict=True):
                if weight:
                    rows += 1
                    tokens[expert] += 1
                    gates[expert] += values[expert] / 18
        expected = {e: count / rows for e, count in enumerate(tokens)}
        assert scores.token_scores[layer.index] == pytest.approx(expected, abs=1e-9)
        assert scores.gate_scores[layer.index] == pytest.approx(dict(enumerate(gates)), abs=1e-6)


def router_logits(out: torch.Tensor | tuple) -> torch.Tensor:
    """First in transformers 5.23; some families of 5.20 have them last, or return nothing else."""
    outputs = out if isinstance(out, tuple) else (out,)
    return next(t for t in (outputs[0], outputs[-1]) if t.is_floating_point() and t.shape[-1] >= 8)


def gate_values(family: str, logits: torch.Tensor) -> torch.Tensor:
    if family in ("gemma4", "diffusion_gemma"):  # whose routers return probabilities
        return logits
    if family == "deepseek_v4":
        return (1 + logits.exp()).log().sqrt()
    return 1 / (1 + (-logits).exp()) if family in SIGMOID else logits.exp() / logits.exp().sum(-1, keepdim=True)


@pytest.mark.parametrize("family", [f for f in FAMILIES if zoo.model_class(f).__name__.endswith("ForCausalLM")])
def test_the_training_loss_is_the_cross_entropy_of_the_models_own_logits(family: str):
    model = zoo.tiny(family)
    ids = zoo.tokens()
    labels = ids.masked_fill(torch.arange(9) < 3, IGNORE)
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    total, count = batch_loss(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    assert count == 12
    assert close(total, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_of_shared_experts_is_found(family: str):
    model = zoo.tiny(family)
    layers = moe_layers(model)
    found = {p for layer in layers for module in layer.shared_experts for p in module.parameters()}
    decoder_layers = {match[0] for layer in layers if (match := re.match(r".*?\.\d+\.", layer.name))}
    for name, parameter in model.named_parameters():
        if any(name.startswith(at) for at in decoder_layers):
            assert (parameter in found) == ("share" in name), name


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
    chosen = ExpertSelection(selection(model).experts, shared_experts=True, non_expert_modules=True)
    swapped(model, chosen)
    tune(model)
    esft.save_adapter(model, tmp_path / "a")
    esft.merge(tmp_path / "base", tmp_path / "a", tmp_path / "merged")
    merged, info = cls.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    expected, base = esft.unswap(model).state_dict(), zoo.tiny(family)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in merged.state_dict().items())
    routed = {p for layer in moe_layers(base) for p in routed_parameters(layer)}
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
        chosen = ExpertSelection(selection(model).experts, shared_experts=True, non_expert_modules=True)
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

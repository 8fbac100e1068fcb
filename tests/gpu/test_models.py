"""Whole models: swapped, trained, resumed, scored and loaded in few bits where the GPU is, held to the CPU."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM, PreTrainedModel

import esft
from esft.selection import ExpertSelection
from esft.training import steps as steps_module
from tests.esft.models import save_tiny, token_batch
from tests.esft.small_runs import base_and_data, breaks, column, run, settings
from tests.esft_kernels.layers import assert_close
from tests.gpu.device import DEVICE, gpu_only, sized

TINY = Path(__file__).resolve().parents[2] / "examples" / "tiny-moe"
SELECTION = ExpertSelection({1: [2, 7], 2: [0]})
# Of the largest value, after as many layers as the model has. In 16 bits a router may choose another expert.
NEAR = {torch.float32: 1e-3, torch.bfloat16: 0.1}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return sized(TINY, None) or save_tiny(tmp_path_factory.mktemp("tiny") / "base")


def stock(checkpoint: Path, dtype: torch.dtype, device: torch.device | str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype).to(device).eval()


def batch_on(device: torch.device | str) -> dict[str, torch.Tensor]:
    return {name: t.to(device) for name, t in token_batch().items()}


def loss_and_gradients(model: PreTrainedModel) -> tuple[float, dict[str, torch.Tensor]]:
    batch = batch_on(model.device)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    loss = model(**batch, labels=labels).loss
    loss.backward()
    named = model.named_parameters()
    return loss.item(), {n: p.grad.cpu() for n, p in named if p.requires_grad and p.grad is not None and p.numel()}


@pytest.mark.parametrize("dtype", sized([torch.float32, torch.bfloat16], [torch.float32]))
def test_a_swapped_models_loss_and_gradients_are_those_of_the_reference_on_the_cpu(checkpoint, dtype):
    right, gradients = loss_and_gradients(esft.swap(stock(checkpoint, torch.float32, "cpu"), SELECTION, "reference"))
    loss, found = loss_and_gradients(esft.swap(stock(checkpoint, dtype, DEVICE), SELECTION))
    assert loss == pytest.approx(right, rel=NEAR[dtype])
    assert found.keys() == gradients.keys() and len(found) >= 4
    for name, expected in gradients.items():
        assert expected.any()
        if dtype == torch.float32:
            assert_close(found[name], expected, NEAR[dtype], name)
        else:
            assert torch.cosine_similarity(found[name].double().view(-1), expected.double().view(-1), dim=0) > 0.95, (
                name
            )


def test_swapping_and_back_leaves_logits_and_weights(checkpoint):
    model = stock(checkpoint, torch.float32, DEVICE)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        expected = model(**batch_on(DEVICE)).logits
        assert_close(esft.swap(model, SELECTION)(**batch_on(DEVICE)).logits, expected, NEAR[torch.float32], "logits")
    after = dict(esft.unswap(model).named_parameters())
    assert before.keys() == after.keys() and all(torch.equal(p, after[name]) for name, p in before.items())


@pytest.mark.parametrize("frozen", sized(["int8", "nf4", "nf4_double", "fp8"], ["int8"]))
def test_a_model_loaded_in_few_bits_is_that_of_the_cpu(checkpoint, frozen, monkeypatch):
    model = esft.load(str(checkpoint), SELECTION, frozen=frozen, dtype="float32")
    assert model.device.type == DEVICE.type
    loss, found = loss_and_gradients(model)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    right, gradients = loss_and_gradients(
        esft.load(str(checkpoint), SELECTION, frozen=frozen, dtype="float32", backend="reference")
    )
    assert loss == pytest.approx(right, rel=NEAR[torch.float32])
    for name, expected in gradients.items():
        assert_close(found[name], expected, NEAR[torch.float32], name)


def test_scores_choose_the_experts_that_they_choose_on_the_cpu(checkpoint):
    batches = [token_batch(seed=seed) for seed in range(3)]
    here, there = (esft.score_experts(stock(checkpoint, torch.float32, where), batches) for where in (DEVICE, "cpu"))
    for layer, scores in there.token_scores.items():
        assert here.token_scores[layer] == pytest.approx(scores, abs=0.02)  # a near tie falls either way
        assert here.gate_scores[layer] == pytest.approx(there.gate_scores[layer], rel=1e-3, abs=1e-3)
    selection = esft.select_experts(here, by="token", top_p=0.2)
    assert selection.experts.keys() == there.token_scores.keys() and all(selection.experts.values())


def test_a_swapped_model_generates_what_the_stock_one_does_on_the_cpu(checkpoint):
    prompt = {name: t[:1, :9] for name, t in token_batch().items()}
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    expected = stock(checkpoint, torch.float32, "cpu").generate(**prompt, **options)
    model = esft.swap(stock(checkpoint, torch.float32, DEVICE), SELECTION)
    found = model.generate(**{name: t.to(DEVICE) for name, t in prompt.items()}, **options)
    assert found.shape == (1, 17) and torch.equal(found.cpu(), expected)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return base_and_data(tmp_path_factory.mktemp("saved")).parent


@pytest.fixture
def base(saved, tmp_path):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    return tmp_path / "base"


def adapter(base: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(base.parent / name / "adapter" / "adapter.safetensors")


# Without the attention whose backward does not give the same bits twice.
@pytest.mark.parametrize("dtype", sized(["bfloat16", "float32"], ["bfloat16"]))
def test_a_resumed_training_has_the_bits_of_the_unbroken_one_and_its_adapter_is_for_any_device(
    base, dtype, monkeypatch
):
    config = settings(steps=sized(6, 4), save_every=2, eval_every=99, dtype=dtype)
    real, count = steps_module.batch_loss, breaks(4)
    with sdpa_kernel(SDPBackend.MATH):
        run(base, "whole", config)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(steps_module, "batch_loss", lambda *args: count() or real(*args))
            run(base, "run", config)
        run(base, "run", None, None, resume=True)
    one, other = (adapter(base, name) for name in ("whole", "run"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    losses = column(base.parent / "run", "loss")
    assert losses == column(base.parent / "whole", "loss") and losses[-1] < losses[0]
    model = esft.load_adapter(stock(base, torch.float32, "cpu"), base.parent / "run" / "adapter")
    assert all(p.device.type == "cpu" for p in model.parameters())
    tuned = esft.load_adapter(esft.swap(stock(base, torch.float32, DEVICE), SELECTION), base.parent / "run" / "adapter")
    with torch.no_grad():
        expected, found = (m(**batch_on(m.device)).logits.cpu() for m in (model, tuned))
    assert_close(found, expected, NEAR[torch.float32], "logits")


@gpu_only
@pytest.mark.parametrize(
    "changes",
    [
        {"compile": True}, {"recompute": "frozen"}, {"frozen": "int8"}, {"frozen": "nf4", "frozen_linear": "nf4"},
        {"optimizer": "adamw_8bit"}, {"packing": True, "max_length": 64}, {"method": "full"}, {"method": "lora"},
    ],
    ids=str,
)  # fmt: skip
def test_a_training_learns_however_it_is_done(base, changes):
    selection = None if changes.get("method") in ("full", "lora") else SELECTION
    run(base, "run", settings(**({"steps": 6, "eval_every": 99} | changes)), selection)
    losses = column(base.parent / "run", "loss")
    assert len(losses) == 6 and losses[-1] < losses[0]

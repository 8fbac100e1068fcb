import pytest
import torch
import torch.nn.functional as F
from esft.config import TrainConfig
from esft.data import IGNORE, collate, encode_all
from esft.evaluate import (
    answer,
    batch_loss,
    exact_match,
    has_plain_head,
    load_any_adapter,
    matches,
    mean_loss,
    split_prompt,
)

import esft
from esft.checkpoint import load_model
from tests.esft import zoo
from tests.esft.models import chat, save_tiny, tiny_model, tiny_tokenizer, write_records


def examples():
    return encode_all(tiny_tokenizer(), [chat("x" * n, "y" * (n + 1)) for n in range(1, 8)], 99, "here")


def test_mean_loss_equals_transformers_own_loss():
    model, pad = tiny_model(), 258
    total, count = 0.0, 0
    for example in examples():
        batch = collate([example], pad)
        logits = model(input_ids=batch["input_ids"]).logits[0, :-1]
        total += F.cross_entropy(logits, batch["labels"][0, 1:], ignore_index=IGNORE, reduction="sum").item()
        count += int((batch["labels"][0, 1:] != IGNORE).sum())
    for batch_size in (1, 3, 100):
        assert mean_loss(model, examples(), pad, batch_size) == pytest.approx(total / count, rel=1e-5)


def capped(cap: float | None):
    model = zoo.tiny("gemma4", final_logit_softcapping=cap).bfloat16()
    model.set_experts_implementation("eager")  # the default cannot take rows this short in bfloat16
    return model


@pytest.mark.parametrize("cap", [None, 30.0])
def test_in_bfloat16_a_cap_is_seen_though_the_logits_at_hand_are_far_below_it(cap: float | None):
    assert has_plain_head(capped(cap)) == (cap is None)


@pytest.mark.parametrize("cap", [None, 30.0])
def test_in_bfloat16_the_loss_is_that_of_the_models_own_logits(cap: float | None):
    model, ids = capped(cap), zoo.tokens()
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    with torch.no_grad():
        batch_loss(model, batch)  # what the model is taken for is settled now, before its logits grow
        model.get_output_embeddings().weight.mul_(50)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        loss, _ = batch_loss(model, batch)
    expected = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    assert loss == pytest.approx(float(expected), rel=1e-3)


def test_a_head_with_a_bias_is_not_plain_and_no_hook_stays():
    model = tiny_model()
    model.lm_head.bias = torch.nn.Parameter(torch.full((300,), 1e-3))
    assert not has_plain_head(model)
    model = tiny_model()
    model.lm_head.register_forward_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        has_plain_head(model)
    assert not model.model._forward_hooks


def test_batched_answers_equal_single_ones_in_the_given_order():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    prompts = [chat("q" * n, "")[:1] for n in (5, 1, 9, 3)]
    together = answer(model, tokenizer, prompts, max_new_tokens=6, batch_size=3)
    assert together == [answer(model, tokenizer, [p], max_new_tokens=6)[0] for p in prompts]


@pytest.mark.parametrize(
    ("given", "expected", "right"),
    [
        ('{"b": 1, "a": [2]}', '{"a":[2],"b":1}', True),
        ('{"a": 1', '{"a": 1}', False),
        ('{"a": "1"}', '{"a": 1}', False),
        (" K AE T \n", "K AE T", True),
        ("5.0", "5", False),
    ],
)
def test_json_is_compared_by_value_and_text_by_letter(given: str, expected: str, right: bool):
    assert matches(given, expected) == right


def test_exact_match_counts_the_outcomes(monkeypatch):
    monkeypatch.setattr("esft.evaluate.answer", lambda *_: ["yes", "no"])
    share, outcomes = exact_match(tiny_model(), tiny_tokenizer(), [chat("a", "yes"), chat("b", "yes")])
    assert share == 0.5
    assert [o["correct"] for o in outcomes] == [True, False]
    assert outcomes[1] == {"prompt": "b", "expected": "yes", "given": "no", "correct": False}


def test_the_last_assistant_turn_is_the_one_to_answer():
    prompt, expected = split_prompt([*chat("a", "b"), *chat("c", "d")])
    assert (len(prompt), expected) == (3, "d")


def test_a_folder_without_an_adapter_is_refused(tmp_path):
    with pytest.raises(esft.InputError, match="not an adapter folder"):
        load_any_adapter(tiny_model(), tmp_path)


def test_lora_adapters_load_through_peft(tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_model(), peft.LoraConfig(target_modules=["o_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path)
    loaded = load_any_adapter(tiny_model(), tmp_path)
    ids = torch.tensor([[256, 4, 5]])
    torch.testing.assert_close(loaded(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


def test_a_lora_adapter_is_held_to_its_base_and_a_truncated_one_is_refused(tmp_path):
    pytest.importorskip("peft")
    base, other = save_tiny(tmp_path / "base"), save_tiny(tmp_path / "other", seed=1)
    write_records(tmp_path / "d.jsonl")
    config = TrainConfig(method="lora", steps=1, batch_size=4)
    esft.train(str(base), tmp_path / "d.jsonl", tmp_path / "run", config, progress=False)
    adapter = tmp_path / "run" / "adapter"
    load_any_adapter(load_model(str(base)), adapter)
    with pytest.raises(esft.InputError, match="made from another base"):
        load_any_adapter(load_model(str(other)), adapter)
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(esft.InputError, match="cannot load this PEFT adapter"):
        load_any_adapter(load_model(str(base)), adapter)

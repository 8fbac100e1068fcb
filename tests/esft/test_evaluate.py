import pytest
import torch
import torch.nn.functional as F

import esft
from esft.checkpoint import load_model
from esft.config import TrainConfig
from esft.data import IGNORE, collate, encode_all
from esft.evaluate import answer, exact_match, load_any_adapter, matches, mean_loss, split_prompt
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

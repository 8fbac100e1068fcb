import pytest
import torch
from transformers import GenerationConfig

import esft
from esft.checkpoint.source import Reach
from esft.data.records import Record
from esft.evaluation import answers as module
from esft.evaluation.answers import answer, encode_prompts, end_tokens
from esft.parallel.ranks import Ranks
from tests.esft.models import adds_a_start, chat, conversation, record_generate, tiny_model, tiny_tokenizer


def speaker():
    """A model that answers in capital and small letters."""
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight.mul_(3)
        model.lm_head.weight[:32] = 0
        model.lm_head.weight[94:] = 0
    return model


PROMPTS = ["hello", "a", "say it twice", "no"]


@torch.no_grad()
def greedy(model, prompt: str, count: int) -> list[int]:
    """The likeliest token after the prompt, ``count`` times."""
    ids = prompt_ids(prompt)
    for _ in range(count):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[-count:]


def prompt_ids(prompt: str) -> list[int]:
    return [256, 259, *tiny_tokenizer()(prompt)["input_ids"], 257, 260]


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_answers_are_the_likeliest_tokens_in_the_given_order(batch_size: int):
    model, tokenizer = speaker(), tiny_tokenizer()
    expected = [tokenizer.decode(greedy(model, prompt, 6)) for prompt in PROMPTS]
    assert len(set(expected)) == 4
    assert all(len(text) == 6 for text in expected)
    model.generation_config.do_sample = True
    model.generation_config.temperature = 10.0
    given = answer(model.train(), tokenizer, [conversation(p) for p in PROMPTS], 6, batch_size)
    assert given == expected
    assert not model.training


def test_an_answer_ends_at_the_tokenizers_end_marker():
    """And has neither the marker nor the padding that follows it while another answer goes on."""
    model, tokenizer = speaker(), tiny_tokenizer()
    first = greedy(model, "hello", 5)
    assert first[4] not in first[:4] + greedy(model, "no", 8)
    with torch.no_grad():  # another special token is said in the place of the fifth
        model.lm_head.weight[261] = model.lm_head.weight[first[4]]
        model.lm_head.weight[first[4]] = 0
    tokenizer.eos_token = "<|system|>"
    long = greedy(model, "hello", 8)
    assert long[:5] == [*first[:4], 261]
    assert tokenizer.decode(long[5:])
    given = answer(model, tokenizer, [conversation("hello"), conversation("no")], 8)
    assert given == [tokenizer.decode(first[:4]), tokenizer.decode(greedy(model, "no", 8))]


def test_prompts_are_rendered_once_and_padded_on_the_left_where_nothing_looks():
    model, tokenizer = tiny_model(), adds_a_start(tiny_tokenizer())
    tokenizer.pad_token = "<|system|>"
    calls = record_generate(model)
    assert answer(model, tokenizer, [conversation("hello"), conversation("a")]) == ["a", "a"]
    (call,) = calls
    assert call["input_ids"].tolist() == [[261] * (16 - len(ids)) + ids for ids in map(prompt_ids, ("a", "hello"))]
    assert call["attention_mask"].tolist() == [[0] * (16 - n) + [1] * n for n in (5, 9)]
    assert (call["pad_token_id"], call["eos_token_id"], call["do_sample"]) == (261, [257], False)


def test_prompts_go_where_the_model_is():
    model = tiny_model().to("meta")
    calls = record_generate(model)
    answer(model, tiny_tokenizer(), [conversation("a")])
    assert {calls[0][name].device.type for name in ("input_ids", "attention_mask")} == {"meta"}


def test_a_prompt_has_no_more_tokens_than_is_said_leaves_one_position_for_an_answer_and_has_known_tokens():
    prompts, ids = [conversation("a"), conversation("hello")], [prompt_ids("a"), prompt_ids("hello")]
    assert [len(each) for each in ids] == [5, 9] and max(max(each) for each in ids) == 260
    assert [e.ids for e in encode_prompts(tiny_tokenizer(), prompts, Reach(10, 261), 9)] == ids
    assert [e.ids for e in encode_prompts(tiny_tokenizer(), prompts, Reach(None, None))] == ids
    for reach, longest, message in (
        (Reach(10, 261), 8, "prompt 2: has 9 tokens, more than `max_length=8`"),
        (Reach(9, 261), None, "prompt 2: has 9 tokens, and the model 9 positions"),
        (Reach(10, 260), None, "prompt 1: has token 260; the model has 260 tokens"),
    ):
        with pytest.raises(esft.InputError, match=f"^{message}$"):
            encode_prompts(tiny_tokenizer(), prompts, reach, longest)


def test_64_prompts_are_answered_at_a_time_with_128_tokens_unless_told():
    model = tiny_model()
    calls = record_generate(model)
    assert answer(model, tiny_tokenizer(), [conversation("a")] * 70) == ["a"] * 70
    assert [(len(call["input_ids"]), call["max_new_tokens"]) for call in calls] == [(64, 128), (6, 128)]


def test_no_answer_of_a_batch_goes_beyond_the_positions_that_its_longest_prompt_leaves():
    model, prompts = tiny_model(max_position_embeddings=12), [conversation("hello"), conversation("a")]
    calls = record_generate(model)
    for batch_size in (2, 1):
        answer(model, tiny_tokenizer(), prompts, 9, batch_size)
    assert [call["max_new_tokens"] for call in calls] == [12 - 9, 12 - 5, 12 - 9]


def test_progress_is_shown_when_wanted_only(capsys):
    model, tokenizer = tiny_model(), tiny_tokenizer()
    record_generate(model)
    answer(model, tokenizer, [conversation("a")])
    assert capsys.readouterr().err == ""
    answer(model, tokenizer, [conversation("a")], progress=True)
    assert "generate: 100%" in (shown := capsys.readouterr().err) and "batch" in shown


def test_every_token_tells_others_that_this_process_is_at_work(monkeypatch):
    class Counting(Ranks):
        count = 0

        def progress(self) -> None:
            self.count += 1

    monkeypatch.setattr(module, "current", lambda: ranks)
    ranks = Counting()
    answer(speaker(), tiny_tokenizer(), [Record(chat("a", "")[:1])], max_new_tokens=5)
    assert ranks.count == 5


def test_the_models_own_end_tokens_end_an_answer_beside_the_tokenizers():
    model, tokenizer = speaker(), tiny_tokenizer()
    whole = greedy(model, "hello", 5)
    own, other = tokenizer.eos_token_id, whole[3]
    for said, ends in ((None, [own]), (own, [own]), (other, [own, other]), ([1, own, other], [own, 1, other])):
        model.generation_config.eos_token_id = said
        assert end_tokens(model, tokenizer) == ends
        (given,) = answer(model, tokenizer, [conversation("hello")], 5)
        # A listed token that is no special one is no part of the answer either.
        assert given == tokenizer.decode(whole[: whole.index(other)] if other in ends else whole)


def test_a_text_is_gone_on_with_as_it_is():
    model, prompt = tiny_model(), Record(text="ab", prompt=2)
    calls = record_generate(model)
    answer(model, tiny_tokenizer(), [prompt])
    (row,), (mask,) = calls[0]["input_ids"], calls[0]["attention_mask"]
    assert row[mask.bool()].tolist() == tiny_tokenizer()("ab")["input_ids"]


def test_every_row_of_logits_needs_a_largest_one():
    logits = torch.tensor([[0.0, -torch.inf], [1.0, 2.0]])
    assert module._check_logits(torch.zeros(2, 1), logits) is logits
    logits[0, 0] = -torch.inf
    with pytest.raises(esft.InputError, match="^the model's logits are no numbers"):
        module._check_logits(torch.zeros(2, 1), logits)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 3e38])
@pytest.mark.parametrize("spoilt", ["lm_head.weight", "model.norm.weight"])
def test_a_model_whose_logits_are_no_numbers_answers_nothing(value: float, spoilt: str):
    model = tiny_model()
    with torch.no_grad():
        model.get_parameter(spoilt).fill_(value)
    with pytest.raises(esft.InputError, match="^the model's logits are no numbers: "):
        answer(model, tiny_tokenizer(), [conversation("say a")], 3)


def test_tokens_that_a_model_rules_out_are_no_fault():
    model = tiny_model()
    expected = answer(model, tiny_tokenizer(), [conversation("say a")], 3)
    first = torch.arange(300) == 299

    def rule_out(module, args, out):
        return out.masked_fill(first, -torch.inf)

    model.lm_head.register_forward_hook(rule_out)
    assert answer(model, tiny_tokenizer(), [conversation("say a")], 3) == expected


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 0}, {"repetition_penalty": 0}, {"return_dict_in_generate": True}, {"stop_strings": ["a"]},
        {"sequence_bias": {"x": 1}}, {"penalty_alpha": 0.5, "top_k": 4}, {"prompt_lookup_num_tokens": 3},
        {"suppress_tokens": list(range(250))}, {"max_time": 0}, {"custom_generate": "some/where"},
    ],
    ids=str,
)  # fmt: skip
def test_what_the_models_generation_settings_say_is_not_used_and_is_left_as_it_is(settings: dict):
    model, prompts = tiny_model(), [conversation("say a"), conversation("say bcd")]
    expected = answer(model, tiny_tokenizer(), prompts, 4)
    model.generation_config = own = GenerationConfig(**settings)
    assert answer(model, tiny_tokenizer(), prompts, 4) == expected
    assert model.generation_config is own and own.to_diff_dict().items() >= settings.items()

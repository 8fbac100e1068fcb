import pytest
import torch
import torch.nn.functional as F
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import GenerationConfig
from transformers.modeling_outputs import MoeModelOutputWithPast

import esft
from esft.checkpoint.source import Reach
from esft.data.batches import collate
from esft.data.encoding import encode_all
from esft.data.examples import IGNORE, Example
from esft.data.records import Record
from esft.experts.model_state import model_state
from esft.training.evaluate import (
    answer,
    batch_loss,
    encode_prompts,
    exact_match,
    has_plain_head,
    matches,
    mean_loss,
    split_prompt,
)
from tests.esft import zoo
from tests.esft.models import chat, record, tiny_encoder, tiny_model, tiny_tokenizer

PAD = 258
IDS = torch.tensor([[256, 4, 5]])


def examples():
    return encode_all(tiny_encoder(), [record("x" * n, "y" * (n + 1)) for n in range(1, 8)], "here")


def loss_of_logits(model, batch) -> tuple[torch.Tensor, int]:
    """From all logits at once, with the mask."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    per_token = F.cross_entropy(logits.float().transpose(1, 2), labels.clamp(min=0), reduction="none")
    return per_token[labels != IGNORE].sum(), int((labels != IGNORE).sum())


@torch.no_grad()
def test_mean_loss_equals_transformers_own_loss():
    model = tiny_model()
    losses = [loss_of_logits(model, collate([example], PAD)) for example in examples()]
    total, count = sum(float(loss) for loss, _ in losses), sum(count for _, count in losses)
    for batch_size in (1, 3, 100):
        assert mean_loss(model, examples(), PAD, batch_size) == pytest.approx(total / count, rel=1e-5)


def test_mean_loss_is_measured_and_left_in_evaluation_mode():
    """The dropout would change the loss in training mode."""
    model = tiny_model(attention_dropout=0.5)
    expected = mean_loss(tiny_model(), examples(), PAD)
    assert mean_loss(model.train(), examples(), PAD) == pytest.approx(expected, rel=1e-6)
    assert not any(module.training for module in model.modules())


def test_mean_loss_keeps_no_graph_and_nothing_has_no_loss():
    model, graphs = tiny_model(), []
    model.model.register_forward_hook(lambda module, args, out: graphs.append(out.last_hidden_state.requires_grad))
    mean_loss(model, examples(), PAD)
    assert graphs and not any(graphs)
    assert mean_loss(model, [], PAD) == 0.0


def test_mean_loss_takes_32_examples_at_a_time_unless_told(monkeypatch):
    rows = []
    counted = lambda model, batch: (rows.append(len(batch["labels"])) or torch.zeros(()), 1)  # noqa: E731
    monkeypatch.setattr("esft.training.evaluate.batch_loss", counted)
    mean_loss(tiny_model(), [examples()[0]] * 70, PAD)
    assert rows == [32, 32, 6]


@pytest.mark.parametrize("plain", [True, False])
def test_a_batchs_loss_and_gradient_are_those_of_the_masked_logits(plain: bool):
    """Padding on the left is seen by the tokens after it unless it is masked."""
    model = tiny_model()
    if not plain:
        model.lm_head.register_forward_hook(lambda module, args, out: 0.5 * out)
    batch = collate(examples(), PAD, left=True)
    wanted, number = loss_of_logits(model, batch)
    (wanted_grad,) = torch.autograd.grad(wanted, model.lm_head.weight)
    loss, count = batch_loss(model, batch)
    (grad,) = torch.autograd.grad(loss, model.lm_head.weight)
    assert has_plain_head(model) is plain
    assert count == number == sum(n + 2 for n in range(1, 8))  # n + 1 letters and the end marker
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=0)
    torch.testing.assert_close(grad, wanted_grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("plain", [True, False])
def test_a_batch_without_supervised_tokens_has_no_loss(plain: bool):
    model = tiny_model()
    model_state(model).found["_has_plain_head"] = plain
    loss, count = batch_loss(model, collate([Example([256, 4, 5], [IGNORE] * 3)], PAD))
    assert (float(loss), count) == (0.0, 0)


def test_a_plain_head_is_not_run_and_no_cache_is_kept():
    """What the head would make is logits of every position."""
    model, caches = tiny_model(), []
    model.model.register_forward_hook(lambda module, args, out: caches.append(out.past_key_values))
    assert has_plain_head(model)
    handle = model.lm_head.register_forward_hook(lambda *args: 1 / 0)
    batch = collate(examples(), PAD)
    batch_loss(model, batch)
    handle.remove()
    model_state(model).found["_has_plain_head"] = False
    batch_loss(model, batch)
    assert caches == [None] * 3


@pytest.mark.parametrize("plain", [True, False])
def test_a_batch_goes_where_the_model_is(monkeypatch, plain: bool):
    """The meta device stands for a GPU: it has no values, but what lies there and what does not is told apart."""
    places = []

    def note(*tensors, **_) -> torch.Tensor:
        places.extend(tensor.device.type for tensor in tensors)
        return torch.zeros(())

    def forward(input_ids, attention_mask, **_):
        note(input_ids, attention_mask)
        return MoeModelOutputWithPast(torch.empty(*input_ids.shape, 32, device="meta"))

    model = tiny_model().to("meta")
    model_state(model).found["_has_plain_head"] = plain
    model.model.forward = forward
    monkeypatch.setattr(f"esft.training.evaluate.{'linear_cross_entropy' if plain else 'F.cross_entropy'}", note)
    batch_loss(model, collate(examples(), PAD))
    assert len(places) >= 4
    assert set(places) == {"meta"}


def test_logits_and_hidden_states_may_lie_elsewhere_than_the_inputs(monkeypatch):
    model, batch = tiny_model(), collate(examples(), PAD)
    expected, _ = loss_of_logits(model, batch)
    rows = model.model(input_ids=batch["input_ids"]).last_hidden_state[:, :-1][batch["labels"][:, 1:] != IGNORE]

    class Elsewhere:
        device = torch.device("meta")

        def __getitem__(self, places):
            assert {place.device.type for place in places} == {"meta"}
            return self

        def to(self, device):
            return rows.to(device)

    model_state(model).found["_has_plain_head"] = True
    hook = model.model.register_forward_hook(lambda module, args, out: setattr(out, "last_hidden_state", Elsewhere()))
    torch.testing.assert_close(batch_loss(model, batch)[0], expected, rtol=1e-5, atol=0)
    hook.remove()
    model_state(model).found["_has_plain_head"] = False
    model.lm_head.register_forward_hook(lambda module, args, out: out.to("meta"))
    monkeypatch.setattr(
        "esft.training.evaluate.F.cross_entropy", lambda logits, labels, **_: (logits.device, labels.device)
    )
    assert [device.type for device in batch_loss(model, batch)[0]] == ["meta", "meta"]


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


@pytest.mark.parametrize(
    ("change", "plain"),
    [
        (lambda out: out + 1, False),
        (lambda out: out - 1, False),
        (lambda out: out * (1 + 4 * 2.0**-23), True),  # four units in the last place: rounding
        (lambda out: out * (1 + 32 * 2.0**-23), False),
        (lambda out: out[..., :-1], False),
    ],
    ids=["raised", "lowered", "rounded otherwise", "scaled", "cut"],
)
@pytest.mark.parametrize("sign", [1, -1])
def test_logits_that_are_more_than_products_are_seen(change, plain: bool, sign: int):
    """Logits below zero everywhere are as large as ones above."""
    model = tiny_model()
    with torch.no_grad():
        hidden = model.model(input_ids=torch.arange(2)[None]).last_hidden_state[0]
        shares = F.normalize(hidden, dim=-1).sum(0)  # has a positive product with either
        model.lm_head.weight.copy_(sign * torch.linspace(0.5, 1, 300)[:, None] * shares)
        logits = model(input_ids=torch.arange(2)[None]).logits
    assert bool((sign * logits > 0).all())
    model.lm_head.register_forward_hook(lambda module, args, out: change(out))
    assert has_plain_head(model) is plain


def test_a_head_with_a_bias_is_not_plain_and_no_hook_stays():
    model = tiny_model()
    model.lm_head.bias = nn.Parameter(torch.full((300,), 1e-6))  # less than rounding does to the logits tried out
    assert not has_plain_head(model)
    model = tiny_model()
    model.lm_head.register_forward_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        has_plain_head(model)
    assert not model.model._forward_hooks


@pytest.mark.parametrize("bent", [False, True])
def test_whether_a_head_is_plain_is_found_once_and_without_a_graph(bent: bool):
    model, graphs = tiny_model(), []
    model.model.register_forward_hook(lambda module, args, out: graphs.append(out.last_hidden_state.requires_grad))
    if bent:
        model.lm_head.register_forward_hook(lambda module, args, out: out + 1)
    assert [has_plain_head(model), has_plain_head(model)] == [not bent] * 2
    assert graphs == [False]


def test_of_a_peft_model_the_model_inside_is_looked_at_and_a_changed_head_is_not_plain():
    peft = pytest.importorskip("peft")
    for target, plain in (("o_proj", True), ("lm_head", False)):
        inner = tiny_model()
        model = peft.get_peft_model(inner, peft.LoraConfig(target_modules=[target]))
        assert has_plain_head(model) is plain
        assert model_state(inner).found["_has_plain_head"] is plain  # a wrapper would look as if it had it too
        assert mean_loss(model, examples(), PAD) == pytest.approx(mean_loss(tiny_model(), examples(), PAD), rel=1e-5)


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


def conversation(prompt: str) -> Record:
    return Record(chat(prompt, "")[:1])


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


def adds_a_start(tokenizer):
    """As many tokenizers do to a text by itself."""
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", tokenizer.bos_token_id)]
    )
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    return tokenizer


def record_generate(model) -> list[dict]:
    calls = []

    def generate(**options):
        calls.append(options)
        rows, length = options["input_ids"].shape
        return torch.full((rows, length + 1), 64)

    model.generate = generate
    return calls


def test_prompts_are_rendered_once_and_padded_on_the_left_where_nothing_looks():
    model, tokenizer = tiny_model(), adds_a_start(tiny_tokenizer())
    tokenizer.pad_token = "<|system|>"
    calls = record_generate(model)
    assert answer(model, tokenizer, [conversation("hello"), conversation("a")]) == ["a", "a"]
    (call,) = calls
    assert call["input_ids"].tolist() == [[261] * (16 - len(ids)) + ids for ids in map(prompt_ids, ("a", "hello"))]
    assert call["attention_mask"].tolist() == [[0] * (16 - n) + [1] * n for n in (5, 9)]
    assert (call["pad_token_id"], call["eos_token_id"], call["do_sample"]) == (261, 257, False)


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
    calls.clear()
    exact_match(model, tiny_tokenizer(), [record("a", "a")] * 70)
    assert [len(call["input_ids"]) for call in calls] == [64, 6]


def test_progress_is_shown_when_wanted_only(capsys):
    model, tokenizer = tiny_model(), tiny_tokenizer()
    record_generate(model)
    answer(model, tokenizer, [conversation("a")])
    exact_match(model, tokenizer, [record("a", "a")])
    assert capsys.readouterr().err == ""
    for run in (
        lambda: answer(model, tokenizer, [conversation("a")], progress=True),
        lambda: exact_match(model, tokenizer, [record("a", "a")], progress=True),
    ):
        run()
        assert "generate: 100%" in (shown := capsys.readouterr().err) and "batch" in shown


@pytest.mark.parametrize(
    ("given", "expected", "right"),
    [
        ('{"b": 1, "a": [2]}', '{"a":[2],"b":1}', True),
        ('{"a": 1', '{"a": 1}', False),
        ('{"a": "1"}', '{"a": 1}', False),
        ('{"a": 1, "b": 2}', '{"a": 1}', False),
        ("[1,  2]", "[1,2]", True),
        ("[2, 1]", "[1, 2]", False),
        ("[1, 2", "[1, 2]", False),
        ("1, 2", "[1, 2]", False),
        (" K AE T \n", "K AE T", True),
        ("K AE T", " K AE T \n", True),
        ("K A E T", "K AE T", False),
        ("k ae t", "K AE T", False),
        ("5.0", "5", False),
        ('"five"', '"five"', True),
        ("five", '"five"', False),
        ("null", "None", False),
    ],
)
def test_json_is_compared_by_value_and_text_by_letter(given: str, expected: str, right: bool):
    assert matches(given, expected) == right


@pytest.mark.parametrize("given", ["[" * 100_000, "[" + "9" * 5000 + "]"])
def test_an_answer_that_cannot_be_read_is_wrong(given: str):
    assert not matches(given, "[1]")


def test_exact_match_counts_the_outcomes(monkeypatch):
    monkeypatch.setattr("esft.training.evaluate.answer", lambda *_: ["yes", "no", " yes", "[1]"])
    last = Record(chat("", "yes")[1:])
    records = [record("a", "yes"), record("b", "yes"), Record([*chat("c", "d"), *chat("e", "yes")]), last]
    share, outcomes = exact_match(tiny_model(), tiny_tokenizer(), records)
    assert share == 0.5
    assert outcomes == [
        {"prompt": "a", "expected": "yes", "given": "yes", "correct": True},
        {"prompt": "b", "expected": "yes", "given": "no", "correct": False},
        {"prompt": "e", "expected": "yes", "given": " yes", "correct": True},
        {"prompt": "", "expected": "yes", "given": "[1]", "correct": False},
    ]


def test_exact_match_leaves_room_for_two_tokens_more_than_the_longest_answer(monkeypatch):
    """An answer that runs on after the right text is wrong, and has to be seen to run on."""
    asked = []

    def runs_on(model, tokenizer, prompts, max_new_tokens, batch_size, progress):
        asked.append((prompts, max_new_tokens, batch_size, progress))
        return ["yes yes yes"[:max_new_tokens]] * len(prompts)  # one token a byte

    monkeypatch.setattr("esft.training.evaluate.answer", runs_on)
    records = [record("a", "no"), record("b", "yes"), record("c", "")]
    share, outcomes = exact_match(tiny_model(), adds_a_start(tiny_tokenizer()), records, 2, True)
    assert (share, [o["given"] for o in outcomes]) == (0.0, ["yes y"] * 3)
    assert asked == [([conversation(p) for p in "abc"], 3 + 2, 2, True)]


def test_the_last_assistant_turn_is_the_one_to_answer():
    before = [*chat("a", "b"), {"role": "user", "content": "c"}]
    after = [{"role": "assistant", "content": "d"}, {"role": "user", "content": "e"}]
    assert split_prompt(Record([*before, *after], tools=[{}])) == (Record(before, tools=[{}]), "d")


def test_of_a_text_the_completion_is_the_answer():
    assert split_prompt(Record(text="abc", prompt=2)) == (Record(text="ab", prompt=2), "c")
    with pytest.raises(esft.InputError, match="^line 3: is a text without a prompt, which has no answer to compare$"):
        split_prompt(Record(text="abc", place="line 3"))


def test_a_text_is_gone_on_with_as_it_is():
    model, prompt = tiny_model(), Record(text="ab", prompt=2)
    calls = record_generate(model)
    answer(model, tiny_tokenizer(), [prompt])
    (row,), (mask,) = calls[0]["input_ids"], calls[0]["attention_mask"]
    assert row[mask.bool()].tolist() == tiny_tokenizer()("ab")["input_ids"]
    share, outcomes = exact_match(model, tiny_tokenizer(), [Record(text="abc", prompt=2)])
    assert [(each["prompt"], each["expected"]) for each in outcomes] == [("ab", "c")]


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

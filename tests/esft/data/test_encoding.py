import logging
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

import esft
from esft.data import encoding
from esft.data.encoding import TOGETHER, Encoder, encode_all, encode_prompt, tokenizer_digests
from esft.data.examples import IGNORE, Example
from esft.data.records import Record
from esft.data.sources import read_records
from tests.esft.models import adds_a_start, chat, record, tiny_encoder, tiny_tokenizer, write_records

SYSTEM = {"role": "system", "content": "be brief"}
MARKED = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}{% endgeneration %}<|end|>{% else %}{{ m['content'] }}<|end|>{% endif %}"
    "{% endfor %}"
)


def learnt(encoder: Encoder, record: Record) -> str:
    """The text of the tokens that count; a bar where others are between them."""
    example = encoder.encode(record)
    assert all(label in (IGNORE, token) for token, label in zip(example.ids, example.labels, strict=True))
    parts = [""]
    for label in example.labels:
        parts = [*parts, ""] if label == IGNORE else [*parts[:-1], parts[-1] + encoder.tokenizer.decode([label])]
    return "|".join(filter(None, parts))


def test_the_loss_covers_every_assistant_turn_and_its_end_and_nothing_else():
    encoder, messages = tiny_encoder(), [SYSTEM, *chat("hi", "yes"), *chat("why?", "no")]
    text = encoder.tokenizer.apply_chat_template(messages, tokenize=False)
    assert encoder.tokenizer.decode(encoder.encode(Record(messages)).ids) == text
    assert learnt(encoder, Record(messages)) == "yes<|end|>|no<|end|>"


def test_a_turn_of_weight_0_is_not_learnt():
    messages = [*chat("hi", "yes"), *chat("why?", "no")]
    messages[1]["weight"] = 0
    assert learnt(tiny_encoder(), Record(messages)) == "no<|end|>"
    everything = learnt(tiny_encoder(assistant_only_loss=False), Record(messages))
    assert everything == "<|bos|><|user|>hi<|end|><|assistant|>|<|user|>why?<|end|><|assistant|>no<|end|>"


def test_a_prompt_is_not_learnt_unless_that_is_asked_for():
    both = Record([*chat("a", "b"), *chat("c", "d")], prompt=3)
    assert learnt(tiny_encoder(), both) == "d<|end|>"
    assert learnt(tiny_encoder(completion_only_loss=False), both) == "b<|end|>|d<|end|>"
    more = Record([*chat("a", "b"), *chat("c", "d")], prompt=1)
    assert learnt(tiny_encoder(), more) == "b<|end|>|d<|end|>"
    rest = tiny_encoder(assistant_only_loss=False)
    assert learnt(rest, more) == "b<|end|><|user|>c<|end|><|assistant|>d<|end|>"
    assert learnt(rest, both) == "d<|end|>"


def test_turns_that_are_not_learnt_may_be_rendered_otherwise_later_on():
    """As templates do that leave out the reasoning of all turns but the last."""
    encoder = tiny_encoder()
    encoder.tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] if loop.last or m['role'] == 'user' else '-' }}"
        "<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    messages = [*chat("a", "b"), *chat("c", "d")]
    with pytest.raises(esft.InputError, match="renders a prefix of a conversation differently"):
        encoder.encode(Record(messages))
    messages[1]["weight"] = 0
    assert learnt(encoder, Record(messages)) == "d<|end|>"
    assert learnt(encoder, Record([*chat("a", "b"), *chat("c", "d")], prompt=3)) == "d<|end|>"


def test_a_completion_may_begin_with_a_question():
    both = Record([*chat("a", "b"), *chat("c", "d")], prompt=2)
    assert learnt(tiny_encoder(assistant_only_loss=False), both) == "<|user|>c<|end|><|assistant|>d<|end|>"


def test_a_text_is_learnt_whole_and_of_prompt_and_completion_the_latter():
    assert learnt(tiny_encoder(), Record(text="abc")) == "abc<|end|>"
    assert learnt(tiny_encoder(), Record(text="abc<|end|>")) == "abc<|end|>"
    assert learnt(tiny_encoder(), Record(text="abc", prompt=2)) == "c<|end|>"
    assert learnt(tiny_encoder(completion_only_loss=False), Record(text="abc", prompt=2)) == "abc<|end|>"


def test_where_the_template_marks_what_is_generated_the_marks_are_learnt():
    encoder = tiny_encoder()
    encoder.tokenizer.chat_template = MARKED
    messages = [SYSTEM, *chat("hi", "yes"), *chat("why?", "no")]
    assert learnt(encoder, Record(messages)) == "yes|no"  # the end stands outside of the marks
    messages[2]["weight"] = 0
    assert learnt(encoder, Record(messages)) == "no"


def test_marks_that_are_of_no_turn_cannot_tell_which_one_to_leave_out():
    encoder = tiny_encoder()
    encoder.tokenizer.chat_template = "{% generation %}{{ messages | length }}{% endgeneration %}"
    messages = [*chat("hi", "yes"), *chat("why?", "no")]
    assert learnt(encoder, Record(messages)) == "4"
    messages[1]["weight"] = 0
    with pytest.raises(esft.InputError, match="^the chat template marks 1 generations of 2 assistant turns$"):
        encoder.encode(Record(messages))


def test_tools_and_further_variables_reach_the_template():
    encoder = tiny_encoder()
    encoder.tokenizer.chat_template = (
        "{{ tools[0].name if tools }}{{ mood }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"
    )
    ids = encoder.encode(Record(chat("a", "b"), tools=[{"name": "lamp"}], template={"mood": "kind"})).ids
    assert encoder.tokenizer.decode(ids) == "lampkind<|user|>a<|assistant|>b"


def test_special_tokens_are_those_of_the_template_alone():
    encoder = tiny_encoder()
    encoder.tokenizer.add_bos_token = True  # as many tokenizers do of their own; the template has one already
    ids = encoder.encode(record("a", "b")).ids
    assert ids.count(encoder.tokenizer.bos_token_id) == 1


def merging(trims: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer that joins "a" with "b", and a space with "b"."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, "ab", "Ġb"])}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[("a", "b"), ("Ġ", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if trims:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="!", chat_template="")


@pytest.mark.parametrize("trims", [False, True])
def test_a_border_is_found_before_a_token_that_begins_with_a_space(trims: bool):
    example = Encoder(merging(trims), 99).encode(Record(text="xa b b", prompt=2))
    assert example.labels == [IGNORE, IGNORE, *example.ids[2:]]
    assert example.ids[2:4] == [257, 257]


@pytest.mark.parametrize("trims", [False, True])
def test_a_token_across_the_border_is_refused(trims: bool):
    with pytest.raises(esft.InputError, match="^a token stands across the border between what is learnt"):
        Encoder(merging(trims), 99).encode(Record(text="xab", prompt=2))


def test_a_tokenizer_that_does_not_tell_its_characters_finds_the_same_borders(monkeypatch):
    messages = [SYSTEM, *chat("hi", "yés"), *chat("why?", "nö")]
    expected = tiny_encoder().encode(Record(messages))

    class Slow(PreTrainedTokenizerFast):
        def __call__(self, *args, **kwargs):
            batch = super().__call__(*args, **kwargs)
            batch._encodings = None
            return batch

    fast = tiny_tokenizer()
    slow = Slow(tokenizer_object=fast.backend_tokenizer, eos_token="<|end|>", bos_token="<|bos|>")
    slow.chat_template = fast.chat_template
    assert slow(["a"]).encodings is None
    assert Encoder(slow, 99).encode(Record(messages)) == expected


@pytest.mark.parametrize("length", [1, 7, 8, 1000, None])
def test_a_longer_record_is_cut_and_without_a_length_none_is(length: int | None):
    whole, cut = (tiny_encoder(n).encode(record("ab", "cdef")) for n in (1000, length))
    assert cut == Example(whole.ids[:length], whole.labels[:length])
    assert IGNORE == -100  # what PyTorch's cross entropy passes over


def test_a_template_that_makes_a_text_of_gigabytes_is_refused():
    encoder = tiny_encoder()
    encoder.tokenizer.chat_template = "{{ 'x' * 16777217 }}"
    with pytest.raises(
        esft.InputError, match="^the chat template makes 16,777,217 characters of it; at most 16,777,216"
    ):
        encoder.encode(record("a", "b"))


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for i in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{{ 10 ** (10 ** 9) }}",
    ],
)
def test_a_template_that_does_not_end_is_broken_off(monkeypatch, template: str):
    monkeypatch.setattr(encoding, "ENCODING", 0.1)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(esft.InputError, match=r"^d.jsonl: record 1: it takes longer than 0\.1 seconds$"):
        encode_all(Encoder(tokenizer, 64), [record("a", "b")], "d.jsonl")
    with pytest.raises(esft.InputError, match=r"^it takes longer than 0\.1 seconds$"):
        encode_prompt(tokenizer, Record([{"role": "user", "content": "a"}]))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says what a process has")
def test_a_template_that_takes_all_memory_is_broken_off():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ '%3000000000d' % 1 }}"
    with pytest.raises(esft.InputError, match=r"record 1: the chat template cannot render it \(MemoryError\)$"):
        encode_all(Encoder(tokenizer, 64), [record("a", "b")], "d.jsonl")
    with pytest.raises(esft.InputError, match=r"^the chat template cannot render it \(MemoryError\)$"):
        encode_prompt(tokenizer, Record([{"role": "user", "content": "a"}]))


def test_a_bar_of_records_is_shown_on_a_terminal_where_it_is_asked_for(monkeypatch, capsys):
    for terminal, progress in ((True, True), (True, False), (False, True)):
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal)
        encode_all(Encoder(tiny_tokenizer(), 64), [record("a", "b")], "d", progress=progress)
        shown = capsys.readouterr().err
        assert ("encode: 100%" in shown and "record/s" in shown) if terminal and progress else not shown


def test_a_template_that_renders_a_prefix_otherwise_is_refused():
    encoder = tiny_encoder()
    encoder.tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(esft.InputError, match="^the chat template renders a prefix .* has no {% generation %} marks"):
        encoder.encode(record("a", "b"))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no system role') if messages[0]['role'] == 'system' else 'x' }}", "no system role"),
        ("{{ messages | length if messages[0]['role'] == 'system' else 'x' }}", "the chat template renders a prefix"),
    ],
)
def test_a_record_that_the_template_cannot_render_is_named(template: str, message: str):
    encoder = tiny_encoder()
    encoder.tokenizer.chat_template = template + "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    bad = [SYSTEM, *chat("a", "b")]
    with pytest.raises(esft.InputError, match=f"^d.jsonl: record 2: .*{message}"):
        encode_all(encoder, [record("a", "b"), Record(bad)], "d.jsonl")
    with pytest.raises(esft.InputError, match=f"^d.jsonl: line 7: .*{message}"):
        encode_all(encoder, [record("a", "b"), Record(bad, place="line 7")], "d.jsonl")


def test_a_text_that_the_tokenizer_does_not_take_is_named_among_others():
    half = Record(text="a\ud800")
    with pytest.raises(esft.InputError, match="^d: record 3: the tokenizer cannot encode it"):
        encode_all(tiny_encoder(), [record("a", "b"), Record(text="x"), half, record("a", "b")], "d")


def test_records_cut_before_their_answer_are_left_out(tmp_path, caplog):
    records = read_records(write_records(tmp_path / "d.jsonl", 4))
    with pytest.raises(esft.InputError, match="d.jsonl: no record has its answer within 5 tokens"):
        encode_all(tiny_encoder(5), records, "d.jsonl")
    caplog.clear()
    # One is cut in its answer, one before it; the first token of an answer alone is enough.
    begun, late, encoder = record("hi", "y" * 99), record("long" * 9, "x"), tiny_encoder(20)
    kept = encode_all(encoder, [records[0], late, begun, *records[1:]], "d.jsonl")
    assert list(kept) == [encoder.encode(record) for record in (records[0], begun, *records[1:])]
    assert (kept.records, kept.truncated) == (6, 2)
    (warning,) = caplog.records
    assert warning.name == "esft" and warning.levelno == logging.WARNING
    assert warning.getMessage() == "d.jsonl: 2 records reach 20 tokens and are cut; 1 left out"


def test_nothing_is_said_where_no_record_is_cut(caplog):
    one = record("a", "b")
    length = len(tiny_encoder().encode(one).ids)
    assert len(encode_all(tiny_encoder(length + 1), [one, one], "d.jsonl")) == 2
    assert not caplog.records


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ 1 / 0 }}", r"record 1: the chat template cannot render it \(division by zero\)"),
        ("{{ messages[7].content.x.y }}", r"record 1: the chat template cannot render it \(."),
        (
            "{% for i in range(999999999) %}x{% endfor %}",
            r"record 1: the chat template cannot render it \(Range too big",
        ),
        ("", "the chat template renders no assistant turn of any record$"),
        ("always the same", "the chat template renders no assistant turn of any record$"),
    ],
)
def test_a_template_that_fails_or_says_nothing_is_named(template: str, message: str):
    encoder = tiny_encoder()
    encoder.tokenizer.chat_template = template
    with pytest.raises(esft.InputError, match=f"^d.jsonl: {message}"):
        encode_all(encoder, [record("a", "b")] * 2, "d.jsonl")


def test_a_token_that_the_model_does_not_have_is_named():
    one = [record("a", "b")]
    largest = max(encode_all(tiny_encoder(), one, "d")[0].ids)
    encode_all(tiny_encoder(vocabulary=largest + 1), one, "d")
    with pytest.raises(
        esft.InputError, match=f"^d: record 1: .* gives token {largest}; the model has {largest} tokens$"
    ):
        encode_all(tiny_encoder(vocabulary=largest), one, "d")


@pytest.mark.parametrize(("processes", "begun"), [(None, []), (1, []), (2, [2]), (3, [3])])
def test_as_many_processes_encode_as_are_asked_for(processes, begun: list[int], monkeypatch):
    asked = []

    def threads(number: int, **more: Any) -> ThreadPoolExecutor:
        asked.append(number)
        return ThreadPoolExecutor(number, **more)

    monkeypatch.setattr(encoding, "ProcessPoolExecutor", threads)
    encode_all(tiny_encoder(40), [record("a", "b")] * 3, "d", processes)
    assert asked == begun


def test_several_processes_give_what_one_gives_and_name_what_is_wrong():
    records = [record("a" * (i % 40), "b" * (i % 7)) for i in range(2 * TOGETHER + 3)]
    one, two = (encode_all(tiny_encoder(40), records, "d", processes) for processes in (None, 2))
    assert list(one) == list(two) and (one.records, one.truncated) == (two.records, two.truncated)
    assert list(one) == [e for r in records if (e := tiny_encoder(40).encode(r)).targets]
    with pytest.raises(esft.InputError, match=f"^d: record {2 * TOGETHER + 4}: the tokenizer cannot encode"):
        encode_all(tiny_encoder(40), [*records, Record(text="\ud800")], "d", 2)


def test_a_prompt_is_what_comes_before_the_answer_or_a_text():
    encoder, user = tiny_encoder(), Record([{"role": "user", "content": "ab"}])
    prompt = encode_prompt(encoder.tokenizer, user)
    assert encoder.tokenizer.decode(prompt) == "<|bos|><|user|>ab<|end|><|assistant|>"
    assert encoder.tokenizer.decode(encode_prompt(encoder.tokenizer, Record(text="ab"))) == "ab"
    started = adds_a_start(tiny_tokenizer())  # which a template has done already
    assert encode_prompt(started, user) == prompt
    assert started.decode(encode_prompt(started, Record(text="ab"))) == "<|bos|>ab"
    encoder.tokenizer.chat_template = ""
    with pytest.raises(esft.InputError, match="^the chat template renders nothing of it$"):
        encode_prompt(encoder.tokenizer, user)


def test_a_digest_tells_all_apart_that_decides_on_the_tokens():
    def digest(tokenizer=None, **settings) -> str | None:
        return Encoder(tokenizer or tiny_tokenizer(), **({"max_length": 9} | settings)).digest()

    other, larger, ended = tiny_tokenizer(), tiny_tokenizer(), tiny_tokenizer()
    other.chat_template += " "
    larger.add_tokens("abc")
    ended.eos_token = "<|pad|>"
    found = [
        digest(), digest(other), digest(larger), digest(ended), digest(max_length=8), digest(vocabulary=300),
        digest(assistant_only_loss=False), digest(completion_only_loss=False),
    ]  # fmt: skip
    assert None not in found and len(set(found)) == len(found)
    assert digest() == found[0]


def test_a_tokenizer_and_its_chat_template_have_a_digest_each_that_no_call_changes():
    other, larger, ended = tiny_tokenizer(), tiny_tokenizer(), tiny_tokenizer()
    other.chat_template += " "
    larger.add_tokens("abc")
    ended.eos_token = "<|pad|>"
    plain = tokenizer_digests(tiny_tokenizer())
    assert [tokenizer_digests(each)["tokenizer"] != plain["tokenizer"] for each in (other, larger, ended)] == [0, 1, 1]
    assert [tokenizer_digests(each)["chat template"] != plain["chat template"] for each in (other, larger)] == [1, 0]
    used = tiny_tokenizer()
    used(["a", "ab"], padding=True, truncation=True, max_length=4)
    assert tokenizer_digests(used) == plain


def test_a_panic_of_a_tokenizers_compiled_code_is_told_and_an_interrupt_is_none(monkeypatch):
    class PanicException(BaseException):
        pass

    encoder = tiny_encoder()
    for error, raised in ((PanicException("overflow"), esft.InputError), (KeyboardInterrupt(), KeyboardInterrupt)):

        def fails(*_, error=error, **__):
            raise error

        monkeypatch.setattr(type(encoder.tokenizer), "__call__", fails)
        for encode in (
            lambda: encoder.encode(Record(text="a")),
            lambda: encode_prompt(encoder.tokenizer, Record(text="a")),
        ):
            with pytest.raises(raised) as told:
                encode()
            assert raised is KeyboardInterrupt or "the tokenizer cannot encode it (overflow)" in str(told.value)


def test_the_digest_of_a_tokenizer_in_plain_python_is_that_of_its_vocabulary():
    def digests(**vocabulary: int) -> dict[str, str]:
        told = {"special_tokens_map": {}, "split_special_tokens": False, "chat_template": "{{ x }}"}
        tokenizer: Any = SimpleNamespace(get_vocab=lambda: dict(vocabulary), **told)
        return tokenizer_digests(tokenizer)

    assert digests(a=1, b=2) == digests(b=2, a=1) != digests(a=2, b=1)
    assert digests(a=1, padding=2) != digests(a=1)


def test_the_date_is_in_the_digest_of_a_template_that_renders_it(monkeypatch):
    plain, dated = tiny_tokenizer(), tiny_tokenizer()
    dated.chat_template = "{{ strftime_now('%d') }}" + str(plain.chat_template)
    found = []
    for day in (1, 2):
        monkeypatch.setattr(encoding, "date", SimpleNamespace(today=lambda day=day: date(2025, 1, day)))
        found.append([Encoder(tokenizer, 9).digest() for tokenizer in (plain, dated)])
    assert found[0][0] == found[1][0] and found[0][1] != found[1][1]


def test_of_a_text_the_tokens_that_the_tokenizer_adds_count_as_well():
    tokenizer = tiny_tokenizer()
    bos, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A <|end|>", special_tokens=[("<|bos|>", bos), ("<|end|>", end)]
    )
    found = Encoder(tokenizer, 99).encode(Record(text="ab"))
    assert (found.ids[0], found.ids[-1], found.labels) == (bos, end, found.ids)
    part = Encoder(tokenizer, 99).encode(Record(text="ab", prompt=1))
    assert part.labels == [IGNORE, IGNORE, *found.ids[2:]]


def test_of_spans_that_overlap_the_last_one_holds():
    """As of a turn of weight 0 in a conversation of which everything else counts."""
    messages = [*chat("hi", "yes"), *chat("why?", "no")]
    messages[1]["weight"] = 0
    found = tiny_encoder(assistant_only_loss=False).encode(Record(messages))
    silent = [i for i, label in enumerate(found.labels) if label == IGNORE]
    assert tiny_tokenizer().decode([found.ids[i] for i in silent]) == "yes<|end|>"

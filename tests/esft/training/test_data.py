import json
import logging
import sys

import pytest
import torch

import esft
from esft.training import data
from esft.training.data import (
    IGNORE,
    Example,
    collate,
    encode,
    encode_all,
    encode_prompt,
    epoch_batches,
    read_records,
    windows,
)
from tests.esft.models import chat, tiny_tokenizer, write_records

RECORD = {"messages": chat("a", "b")}


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("whole", [RECORD, [RECORD, RECORD]])
def test_json_that_is_no_jsonl_is_told_what_is_expected(tmp_path, indent, whole):
    (tmp_path / "d.jsonl").write_text(json.dumps(whole, indent=indent))
    if isinstance(whole, dict) and indent is None:
        assert len(read_records(tmp_path / "d.jsonl")) == 1
        return
    said = "one JSON value over several lines" if indent else 'line 1: no "messages" list'
    wanted = 'a record is a line of its own: {"messages": [{"role": "user", "content": ...}, ...]}'
    with pytest.raises(esft.InputError) as raised:
        read_records(tmp_path / "d.jsonl")
    assert str(raised.value) == f"{tmp_path / 'd.jsonl'}: {said}; {wanted}"


def test_what_is_wrong_with_the_only_record_is_told_whatever_comes_after_it(tmp_path):
    (tmp_path / "d.jsonl").write_text(json.dumps({"messages": chat("a", "b")[:1]}) + "\n\n")
    with pytest.raises(esft.InputError, match=r"d\.jsonl: line 1: no assistant turn$"):
        read_records(tmp_path / "d.jsonl")


def test_a_template_that_makes_a_text_of_gigabytes_is_refused(monkeypatch):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ 'x' * 33554433 }}"
    with pytest.raises(
        esft.InputError, match="^the chat template makes 33,554,433 characters of it; at most 33,554,432"
    ):
        encode(tokenizer, chat("a", "b"), 99)


def test_the_loss_covers_every_assistant_turn_and_its_end_and_nothing_else():
    tokenizer = tiny_tokenizer()
    messages = [{"role": "system", "content": "be brief"}, *chat("hi", "yes"), *chat("why?", "no")]
    example = encode(tokenizer, messages, 100)
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.decode(example.ids) == text
    learnt = [label for label in example.labels if label != IGNORE]
    assert tokenizer.decode(learnt) == "yes<|end|>no<|end|>"
    assert all(label in (IGNORE, token) for token, label in zip(example.ids, example.labels, strict=True))


def test_special_tokens_are_those_of_the_template_alone():
    tokenizer = tiny_tokenizer()
    tokenizer.add_bos_token = True  # as many tokenizers do of their own; the template has one already
    ids = encode(tokenizer, chat("a", "b"), 100).ids
    assert ids.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("length", [1, 7, 8, 1000])
def test_a_longer_record_is_cut(length: int):
    whole, cut = (encode(tiny_tokenizer(), chat("ab", "cdef"), n) for n in (1000, length))
    assert cut == Example(whole.ids[:length], whole.labels[:length])
    assert IGNORE == -100  # what PyTorch's cross entropy passes over


def test_a_template_that_renders_a_prefix_otherwise_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(esft.InputError, match="the chat template renders a prefix of a conversation differently"):
        encode(tokenizer, chat("a", "b"), 100)


def test_padding_has_no_label_and_no_attention():
    examples = [encode(tiny_tokenizer(), chat("a", "bc" * n), 100) for n in (1, 4)]
    right, left = collate(examples, pad=9), collate(examples, pad=9, left=True)
    for row, example in enumerate(examples):
        gap = 16 - len(example.ids)
        assert right["attention_mask"][row].tolist() == [1] * len(example.ids) + [0] * gap
        assert right["input_ids"][row].tolist() == example.ids + [9] * gap
        assert right["labels"][row].tolist() == example.labels + [IGNORE] * gap
        assert left["attention_mask"][row].tolist() == [0] * gap + [1] * len(example.ids)
        assert left["input_ids"][row].tolist() == [9] * gap + example.ids
        assert left["labels"][row].tolist() == [IGNORE] * gap + example.labels


@pytest.mark.parametrize(("longest", "padded"), [(1, 8), (7, 8), (8, 8), (9, 16), (16, 16), (17, 24)])
def test_rows_are_as_long_as_the_longest_rounded_up_to_a_multiple_of_eight(longest: int, padded: int):
    batch = collate([Example([5], [5]), Example([5] * longest, [IGNORE] * longest)], pad=0)
    assert list(batch) == ["input_ids", "attention_mask", "labels"]
    assert {(tuple(t.shape), t.dtype) for t in batch.values()} == {((2, padded), torch.int64)}


@pytest.mark.parametrize("batch_size", [1, 3, 7, 50])
def test_an_epoch_holds_every_example_once_and_depends_on_seed_and_epoch_alone(batch_size: int):
    examples = [Example([0] * (i % 5), []) for i in range(40)]
    batches = epoch_batches(examples, batch_size, seed=3, epoch=1)
    assert sorted(i for batch in batches for i in batch) == list(range(40))
    assert sorted(map(len, batches)) == sorted(
        [batch_size] * (40 // batch_size) + [40 % batch_size] * (40 % batch_size > 0)
    )
    torch.manual_seed(9)
    assert batches == epoch_batches(examples, batch_size, seed=3, epoch=1)
    assert batches != epoch_batches(examples, batch_size, seed=3, epoch=2)
    assert batches != epoch_batches(examples, batch_size, seed=4, epoch=1)


def test_batches_hold_examples_of_like_length_and_come_in_any_order():
    lengths = [(7 * i) % 64 for i in range(64)]  # all different, so that sorting them leaves no choice
    examples = [Example([0] * n, []) for n in lengths]
    batches = epoch_batches(examples, 4, seed=0, epoch=0)
    spans = [[lengths[i] for i in batch] for batch in batches]
    assert sorted(spans) == [list(range(n, n + 4)) for n in range(0, 64, 4)]
    assert spans != sorted(spans) and spans != sorted(spans, reverse=True)


def test_examples_meet_others_of_their_window_of_32_batches_and_windows_change():
    examples = [Example([0] * i, []) for i in range(128)]  # two windows of 32 batches of 2
    first, second = (epoch_batches(examples, 2, seed=0, epoch=epoch) for epoch in (0, 1))
    # Within one window of everything, neighbours in length would always be together.
    assert any(b - a > 1 for a, b in first)
    assert {tuple(batch) for batch in first} != {tuple(batch) for batch in second}
    # A window's batches cut up its sorted half of the examples; so the pairs split into two such halves.
    halves = [[], []]
    for a, b in sorted(first):
        half = min(halves, key=lambda h: (bool(h) and h[-1] > a, -len(h)))
        half += [a, b]
    assert all(half == sorted(half) for half in halves)


def test_windows_hold_every_token_once():
    examples = [encode(tiny_tokenizer(), chat("x" * i, "y"), 100) for i in range(9)]
    batches = list(windows(examples, 16, 2))
    rows = [
        ids[mask.bool()].tolist()
        for batch in batches
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    assert sum(rows, []) == [token for example in examples for token in example.ids]
    assert all(len(row) == 16 for row in rows[:-1])
    assert [len(batch["input_ids"]) for batch in batches] == [2] * (len(rows) // 2) + [1] * (len(rows) % 2)
    assert all(batch.keys() == {"input_ids", "attention_mask"} for batch in batches)


def test_the_rest_of_the_windows_is_padded_with_zeros():
    (batch,) = windows([Example([5, 6, 7], []), Example([8, 9], [])], length=4, batch_size=8)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 0, 0, 0, 0], [9, 0, 0, 0, 0, 0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0]]


def test_records_are_read_in_order_without_blank_lines(tmp_path):
    records = [chat("a", "b"), [{"role": "system", "content": "s"}, *chat("c", "d"), *chat("e", "f")]]
    lines = [json.dumps({"messages": messages, "id": 3}) for messages in records]
    (tmp_path / "d.jsonl").write_text(f"\n{lines[0]}\n  \n\t\r\n{lines[1]}")
    assert read_records(tmp_path / "d.jsonl") == read_records(str(tmp_path / "d.jsonl")) == records


USER = '{"role": "user", "content": "a"}'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"messages": [', "not JSON"),
        ("[1]", 'no "messages" list'),
        ('{"text": "a"}', 'no "messages" list'),
        ('{"messages": []}', 'no "messages" list'),
        ('{"messages": "user"}', 'no "messages" list'),
        ('{"messages": ["user"]}', "a message's role must be one of system, user, assistant"),
        ('{"messages": [{"content": "a"}]}', "a message's role must be one of"),
        (f'{{"messages": [{USER}, {{"role": "robot", "content": "a"}}]}}', "a message's role must be one of"),
        (f'{{"messages": [{USER}]}}', "no assistant turn"),
        ('{"messages": [{"role": "assistant", "content": 3}]}', "a message's content must be text"),
        (f'{{"messages": [{USER}, {{"role": "assistant"}}]}}', "a message's content must be text"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "begins with an assistant turn"),
        *(
            (f'{{"messages": [{{"role": "user", "content": "a{half}b"}}]}}', "content holds half of a surrogate pair")
            for half in ("\\ud800", "\\udabc", "\\udfff")
        ),
        ("[" * 100_000, "JSON that is nested too deeply"),
        ('{"messages": ' + "9" * 5000 + "}", "holds a whole number of thousands of digits"),
        ('{"messages": [], "messages": []}', "has the key 'messages' twice"),
        ('{"messages": [NaN]}', "NaN is no JSON number"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line: str, message: str):
    good = json.dumps({"messages": chat("a", "b")})
    path = tmp_path / "d.jsonl"
    path.write_text(f"{good}\n\n{line}\n")
    with pytest.raises(esft.InputError, match=f"d.jsonl: line 3: (a message's )?{message}"):
        read_records(path)


def test_characters_on_either_side_of_the_surrogates_are_text(tmp_path):
    text = "\ud7ff\ue000\U0001f600"
    (tmp_path / "d.jsonl").write_text(json.dumps({"messages": chat(text, "b")}))  # the last as an escaped pair
    assert read_records(tmp_path / "d.jsonl") == [chat(text, "b")]


def test_empty_missing_and_binary_files_are_refused(tmp_path):
    path = tmp_path / "d.jsonl"
    for content, message in ((b"\n\n", "d.jsonl: holds no records"), (b"\xff\xfe", "d.jsonl: not UTF-8")):
        path.write_bytes(content)
        with pytest.raises(esft.InputError, match=message):
            read_records(path)
    with pytest.raises(esft.InputError, match="absent.jsonl: No such file"):
        read_records(tmp_path / "absent.jsonl")


def test_separators_inside_a_string_and_a_byte_order_mark_do_no_harm(tmp_path):
    record = json.dumps({"messages": chat("a\u2028b\x85c", "d")}, ensure_ascii=False)
    (tmp_path / "d.jsonl").write_text(f"\ufeff{record}\r\n{record}\n", encoding="utf-8")
    assert [messages[0]["content"] for messages in read_records(tmp_path / "d.jsonl")] == ["a\u2028b\x85c"] * 2


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no system role') if messages[0]['role'] == 'system' else 'x' }}", "no system role"),
        ("{{ messages | length if messages[0]['role'] == 'system' else 'x' }}", "the chat template renders a prefix"),
    ],
)
def test_a_record_that_the_template_cannot_render_is_named(template: str, message: str):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template + "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    records = [chat("a", "b"), [{"role": "system", "content": "s"}, *chat("a", "b")]]
    with pytest.raises(esft.InputError, match=f"d.jsonl: record 2: .*{message}"):
        encode_all(tokenizer, records, 99, "d.jsonl")


def test_records_cut_before_their_answer_are_left_out(tmp_path, caplog):
    tokenizer = tiny_tokenizer()
    records = read_records(write_records(tmp_path / "d.jsonl", 4))
    with pytest.raises(esft.InputError, match="d.jsonl: no record has its answer within 5 tokens"):
        encode_all(tokenizer, records, 5, "d.jsonl")
    caplog.clear()
    # One is cut in its answer, one before it; the first token of an answer alone is enough.
    begun, late = chat("hi", "y" * 99), chat("long" * 9, "x")
    kept = encode_all(tokenizer, [records[0], late, begun, *records[1:]], 20, "d.jsonl")
    assert kept == [encode(tokenizer, record, 20) for record in (records[0], begun, *records[1:])]
    (warning,) = caplog.records
    assert warning.name == "esft" and warning.levelno == logging.WARNING
    assert warning.getMessage() == "d.jsonl: 2 records reach 20 tokens and are cut; 1 left out"


def test_nothing_is_said_where_no_record_is_cut(caplog):
    tokenizer, record = tiny_tokenizer(), chat("a", "b")
    length = len(encode(tokenizer, record, 99).ids)
    assert len(encode_all(tokenizer, [record, record], length + 1, "d.jsonl")) == 2
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
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(esft.InputError, match=f"^d.jsonl: {message}"):
        encode_all(tokenizer, [chat("a", "b")] * 2, 64, "d.jsonl")


def test_a_bar_of_records_is_shown_on_a_terminal_where_it_is_asked_for(monkeypatch, capsys):
    for terminal, progress in ((True, True), (True, False), (False, True)):
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal)
        encode_all(tiny_tokenizer(), [chat("a", "b")], 64, "d", progress=progress)
        shown = capsys.readouterr().err
        assert ("encode: 100%" in shown and "record/s" in shown) if terminal and progress else not shown


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for i in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{{ 10 ** (10 ** 9) }}",
    ],
)
def test_a_template_that_does_not_end_is_broken_off(monkeypatch, template: str):
    monkeypatch.setattr(data, "ENCODING", 0.1)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(esft.InputError, match=r"^d.jsonl: record 1: it takes longer than 0\.1 seconds$"):
        encode_all(tokenizer, [chat("a", "b")], 64, "d.jsonl")
    with pytest.raises(esft.InputError, match=r"^it takes longer than 0\.1 seconds$"):
        encode_prompt(tokenizer, [{"role": "user", "content": "a"}])


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says what a process has")
def test_a_template_that_takes_all_memory_is_broken_off():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ '%3000000000d' % 1 }}"
    with pytest.raises(esft.InputError, match=r"record 1: the chat template cannot render it \(MemoryError\)$"):
        encode_all(tokenizer, [chat("a", "b")], 64, "d.jsonl")


def test_a_token_that_the_model_does_not_have_is_named():
    largest = max(encode_all(tiny_tokenizer(), [chat("a", "b")], 64, "d")[0].ids)
    encode_all(tiny_tokenizer(), [chat("a", "b")], 64, "d", largest + 1)
    with pytest.raises(
        esft.InputError, match=f"^d: record 1: .* gives token {largest}; the model has {largest} tokens$"
    ):
        encode_all(tiny_tokenizer(), [chat("a", "b")], 64, "d", largest)


def test_a_prompt_that_renders_to_nothing_is_refused():
    tokenizer = tiny_tokenizer()
    user = [{"role": "user", "content": "ab"}]
    assert tokenizer.decode(encode_prompt(tokenizer, user)) == "<|bos|><|user|>ab<|end|><|assistant|>"
    tokenizer.chat_template = ""
    with pytest.raises(esft.InputError, match="^the chat template renders nothing of it$"):
        encode_prompt(tokenizer, user)

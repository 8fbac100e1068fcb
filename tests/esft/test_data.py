import json

import pytest
from esft.data import IGNORE, collate, encode, encode_all, epoch_batches, read_records, windows

import esft
from tests.esft.models import chat, tiny_tokenizer, write_records


def test_the_loss_covers_every_assistant_turn_and_its_end_and_nothing_else():
    tokenizer = tiny_tokenizer()
    messages = [{"role": "system", "content": "be brief"}, *chat("hi", "yes"), *chat("why?", "no")]
    example = encode(tokenizer, messages, 100)
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.decode(example.ids) == text
    learnt = [label for label in example.labels if label != IGNORE]
    assert tokenizer.decode(learnt) == "yes<|end|>no<|end|>"
    assert all(label in (IGNORE, token) for token, label in zip(example.ids, example.labels, strict=True))


def test_padding_has_no_label_and_no_attention():
    examples = [encode(tiny_tokenizer(), chat("a", "bc" * n), 100) for n in (1, 4)]
    right, left = collate(examples, pad=9), collate(examples, pad=9, left=True)
    assert right["input_ids"].shape == (2, 16)
    for row, example in enumerate(examples):
        gap = 16 - len(example.ids)
        assert right["attention_mask"][row].tolist() == [1] * len(example.ids) + [0] * gap
        assert right["input_ids"][row].tolist() == example.ids + [9] * gap
        assert right["labels"][row].tolist() == example.labels + [IGNORE] * gap
        assert left["attention_mask"][row].tolist() == [0] * gap + [1] * len(example.ids)
        assert left["input_ids"][row].tolist() == [9] * gap + example.ids
        assert left["labels"][row].tolist() == [IGNORE] * gap + example.labels


@pytest.mark.parametrize("batch_size", [1, 3, 7, 50])
def test_an_epoch_holds_every_example_once_and_depends_on_seed_and_epoch_alone(batch_size: int):
    examples = [encode(tiny_tokenizer(), chat("x" * (i % 5), "y"), 100) for i in range(40)]
    batches = epoch_batches(examples, batch_size, seed=3, epoch=1)
    assert sorted(i for batch in batches for i in batch) == list(range(40))
    assert batches == epoch_batches(examples, batch_size, seed=3, epoch=1)
    assert batch_size == 50 or batches != epoch_batches(examples, batch_size, seed=3, epoch=2)


def test_windows_hold_every_token_once():
    examples = [encode(tiny_tokenizer(), chat("x" * i, "y"), 100) for i in range(9)]
    rows = [
        ids[mask.bool()].tolist()
        for batch in windows(examples, 16, 2)
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    assert sum(rows, []) == [token for example in examples for token in example.ids]
    assert all(len(row) == 16 for row in rows[:-1])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"messages": [', "not JSON"),
        ("[1]", 'no "messages" list'),
        ('{"messages": []}', 'no "messages" list'),
        ('{"messages": [{"role": "user", "content": "a"}]}', "no assistant turn"),
        ('{"messages": [{"role": "robot", "content": "a"}]}', "role must be one of"),
        ('{"messages": [{"role": "assistant", "content": 3}]}', "content must be text"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "begins with an assistant turn"),
        ('{"messages": [{"role": "user", "content": "\\ud800"}]}', "half of a surrogate pair"),
        ("[" * 100_000, "not JSON that can be read"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line: str, message: str):
    good = json.dumps({"messages": chat("a", "b")})
    path = tmp_path / "d.jsonl"
    path.write_text(f"{good}\n\n{line}\n")
    with pytest.raises(esft.InputError, match=f"d.jsonl: line 3: .*{message}"):
        read_records(path)


def test_empty_missing_and_binary_files_are_refused(tmp_path):
    path = tmp_path / "d.jsonl"
    for content, message in ((b"\n\n", "holds no records"), (b"\xff\xfe", "not UTF-8")):
        path.write_bytes(content)
        with pytest.raises(esft.InputError, match=message):
            read_records(path)
    with pytest.raises(esft.InputError, match="No such file"):
        read_records(tmp_path / "absent.jsonl")


def test_separators_inside_a_string_and_a_byte_order_mark_do_no_harm(tmp_path):
    record = json.dumps({"messages": chat("a\u2028b\x85c", "d")}, ensure_ascii=False)
    (tmp_path / "d.jsonl").write_text(f"\ufeff{record}\r\n{record}\n", encoding="utf-8")
    assert [messages[0]["content"] for messages in read_records(tmp_path / "d.jsonl")] == ["a\u2028b\x85c"] * 2


def test_a_record_that_the_template_cannot_render_is_named():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no system role') if messages[0]['role'] == 'system' else 'x' }}"
    records = [chat("a", "b"), [{"role": "system", "content": "s"}, *chat("a", "b")]]
    with pytest.raises(esft.InputError, match=r"d.jsonl: record 2: no system role"):
        encode_all(tokenizer, records, 99, "d.jsonl")


def test_records_cut_before_their_answer_are_left_out(tmp_path, caplog):
    records = read_records(write_records(tmp_path / "d.jsonl", 4))
    with pytest.raises(esft.InputError, match="no record has its answer within 5 tokens"):
        encode_all(tiny_tokenizer(), records, 5, "d.jsonl")
    assert len(encode_all(tiny_tokenizer(), [*records, chat("long" * 9, "x")], 20, "d.jsonl")) == 4
    assert "d.jsonl: 1 records reach 20 tokens and are cut; 1 left out" in caplog.text

import itertools
import json

import pytest

import esft
from esft.data.batches import Packing, steps
from esft.data.encoding import encode_all
from esft.data.sources import DataSource, read_records
from esft.data.streaming import streamed
from tests.esft.models import chat, tiny_encoder


def write(path, count: int, letter: str = "a") -> DataSource:
    lines = [{"messages": chat(letter * (1 + i % 7), str(i))} for i in range(count)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return DataSource.of(path)


def taken(*args, count: int = 40, **more):
    return list(itertools.islice(streamed(*args, **more), count))


def test_data_of_one_window_has_the_batches_that_it_has_in_memory(tmp_path):
    source = write(tmp_path / "d.jsonl", 64)
    examples = encode_all(tiny_encoder(), read_records(source), "d")
    assert taken([source], tiny_encoder(), 2, 5, count=32) == list(itertools.islice(steps(examples, 2, 5), 32))


@pytest.mark.parametrize("packing", [None, Packing(32, "bfd")])
def test_every_example_comes_once_a_pass_and_more_passes_follow(tmp_path, packing):
    source = write(tmp_path / "d.jsonl", 150)
    expected = sorted(e.ids for e in encode_all(tiny_encoder(), read_records(source), "d"))
    seen = []
    for batch in streamed([source], tiny_encoder(), 4, 0, packing=packing):
        assert len(batch) <= 4
        for row in batch:
            ends = [*row.starts[1:], len(row.ids)]
            seen += [row.ids[start:end] for start, end in zip(row.starts, ends, strict=True)]
        if len(seen) >= 3 * 150 + 32 * 32:
            break
    assert all(seen.count(ids) >= 3 for ids in expected[::10])
    assert max(map(seen.count, expected[::10])) - min(map(seen.count, expected[::10])) <= 20


@pytest.mark.parametrize("packing", [None, Packing(32, "bfd")])
def test_a_stream_goes_on_from_any_step_with_what_it_would_have_had(tmp_path, packing):
    sources = [write(tmp_path / "d.jsonl", 50), write(tmp_path / "e.jsonl", 9, "b")]
    whole = taken(sources, tiny_encoder(), 2, 3, packing=packing)
    assert taken(sources, tiny_encoder(), 2, 3, first=33, packing=packing, count=7) == whole[33:]


@pytest.mark.parametrize("packing", [None, Packing(8, "bfd")])
def test_every_window_is_shuffled_in_a_way_of_its_own(tmp_path, packing):
    """All records are in each window, and each fills a row."""
    lines = [{"messages": chat(f"{i:02d}", "b")} for i in range(32)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = [
        row for (row,) in taken([DataSource.of(tmp_path / "d.jsonl")], tiny_encoder(), 1, 0, packing=packing, count=64)
    ]
    first, second = ([row.ids for row in half] for half in (rows[:32], rows[32:]))
    assert {len(row.ids) for row in rows} == {8} and first != second and sorted(first) == sorted(second)


def test_no_more_is_read_than_is_held(tmp_path, monkeypatch):
    source, read = write(tmp_path / "d.jsonl", 3000), []
    real = DataSource.records

    def counted(self, streaming=False):
        for each in real(self, streaming):
            read.append(each)
            yield each

    monkeypatch.setattr(DataSource, "records", counted)
    next(streamed([source], tiny_encoder(), 4, 0))
    assert len(read) <= 256


def test_weights_are_the_shares_that_are_drawn(tmp_path):
    sources = [DataSource(write(tmp_path / f"{c}.jsonl", 20, c).path, None, w) for c, w in (("x", 3), ("y", 1))]
    rows = [row for batch in taken(sources, tiny_encoder(), 8, 0, count=100) for row in batch]
    share = sum(ord("x") - 0 in [*map(ord, tiny_encoder().tokenizer.decode(row.ids[2:3]))] for row in rows) / len(rows)
    assert 0.7 < share < 0.8


def test_a_source_without_an_answer_is_named_and_not_read_for_ever(tmp_path):
    source = write(tmp_path / "d.jsonl", 5)
    with pytest.raises(esft.InputError, match="d.jsonl: holds no record with an answer within 3 tokens$"):
        next(streamed([source], tiny_encoder(3), 4, 0))


def test_a_bad_record_far_behind_is_named_when_it_comes(tmp_path):
    source = write(tmp_path / "d.jsonl", 600)
    with open(source.path, "a") as file:
        file.write('{"a": 1}\n')
    batches = streamed([source], tiny_encoder(), 4, 0)
    next(batches)
    with pytest.raises(esft.InputError, match="d.jsonl: line 601: has none of the columns"):
        list(batches)


def test_of_packed_rows_as_many_tokens_are_held_as_fill_32_batches(tmp_path):
    """40 examples of 9 tokens are the fewest that have 32 times 11: each has a row of its own, and comes in a batch
    before any later one does."""
    lines = [{"messages": chat(f"{i:02d}", "ab")} for i in range(100)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = taken([DataSource.of(tmp_path / "d.jsonl")], tiny_encoder(), 1, 0, packing=Packing(11, "bfd"), count=80)
    numbers = [int(tiny_encoder().tokenizer.decode(row.ids[2:4])) for (row,) in rows]
    assert {len(row.ids) for (row,) in rows} == {9}
    assert sorted(numbers[:40]) == list(range(40)) and sorted(numbers[40:]) == list(range(40, 80))
    assert max(numbers[:5]) >= 20  # of all that are held, and not of the first few


def test_which_source_comes_next_depends_on_the_seed(tmp_path):
    sources = [DataSource(write(tmp_path / f"{c}.jsonl", 20, c).path, None, 1) for c in "xy"]
    one, same, other = (taken(sources, tiny_encoder(), 8, seed, count=32) for seed in (0, 0, 1))
    letters = [
        sorted(row.ids[2] for batch in batches for row in batch) for batches in (one, same, other)
    ]  # how often each source came
    assert one == same and letters[0] != letters[2]


def test_a_record_that_cannot_be_encoded_is_named_by_its_place(tmp_path):
    lines = [{"messages": chat("a", "b")}, {"messages": chat("a", "b"), "chat_template_kwargs": {"add": 1}}]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(line) + "\n\n" for line in lines))
    encoder = tiny_encoder()
    encoder.tokenizer.chat_template = "{{ 1 / 0 if add else 'x' }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(esft.InputError, match=r"d.jsonl: line 3: the chat template cannot render it"):
        next(streamed([DataSource.of(tmp_path / "d.jsonl")], encoder, 4, 0))

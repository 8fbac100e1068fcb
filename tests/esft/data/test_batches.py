import itertools

import pytest
import torch

from esft.data.batches import Packing, collate, epoch_batches, lengths_of, packed_batches, steps, windows
from esft.data.examples import IGNORE, Example, Examples, joined
from esft.data.mixing import Mix
from tests.esft.models import record, tiny_encoder


def test_padding_has_no_label_and_no_attention():
    examples = [tiny_encoder().encode(record("a", "bc" * n)) for n in (1, 4)]
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
    examples = [tiny_encoder().encode(record("x" * i, "y")) for i in range(9)]
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


def test_documents_in_a_row_have_positions_of_their_own_and_so_has_the_padding():
    row = joined([Example([5, 6, 7], [5, 6, 7]), Example([8, 9], [8, 9])])
    batch = collate([row, Example([1], [1])], pad=0)
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1, 2], [0, 0, 1, 2, 3, 4, 5, 6]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0]]
    assert batch["labels"][0].tolist() == [5, 6, 7, IGNORE, 9, IGNORE, IGNORE, IGNORE]
    assert "position_ids" not in collate([joined([row.cut(0, 3)])], pad=0)


def some(count: int) -> list[Example]:
    return [Example([i] * (1 + i % 5), [i] * (1 + i % 5)) for i in range(count)]


def test_packed_batches_hold_every_example_once_and_depend_on_seed_and_epoch_alone():
    examples, packing = some(40), Packing(8, "bfd")
    batches = packed_batches(examples, 3, 5, 1, packing)
    assert [len(batch) for batch in batches[:-1]] == [3] * (len(batches) - 1)
    assert sorted(piece.example for batch in batches for row in batch for piece in row) == list(range(40))
    assert batches == packed_batches(examples, 3, 5, 1, packing)
    assert batches != packed_batches(examples, 3, 5, 2, packing) != packed_batches(examples, 3, 4, 1, packing)
    longest = [row[0].end for batch in batches for row in batch]  # as packed, the rows would come by that
    assert longest != sorted(longest, reverse=True)


def test_rows_of_an_evaluation_come_as_they_are_packed():
    rows = Packing(5, "bfd").rows(some(5))
    assert [row.ids for row in rows] == [[4] * 5, [3] * 4 + [0], [2] * 3 + [1] * 2]
    assert [row.starts for row in rows] == [(0,), (0, 4), (0, 3)]


@pytest.mark.parametrize("packing", [None, Packing(8, "bfd"), Packing(8, "wrapped")])
def test_steps_go_on_from_any_one_with_what_it_would_have_had(packing: Packing | None):
    examples = some(22)
    whole = list(itertools.islice(steps(examples, 4, 7, 0, packing), 20))
    for first in (1, 3, 6, 13):
        assert list(itertools.islice(steps(examples, 4, 7, first, packing), 20 - first)) == whole[first:]
    if packing is None:
        batches = [batch for epoch in range(4) for batch in epoch_batches(examples, 4, 7, epoch)]
        assert whole == [[examples[i] for i in batch] for batch in batches[:20]]


@pytest.mark.parametrize("packing", [None, Packing(5, "bfd")])
def test_by_weight_an_epoch_holds_what_is_drawn_of_each_source(packing: Packing | None):
    examples, mix = some(20), Mix([4, 16], [1, 1])  # of the first source each example comes more than once
    for epoch in (0, 3):
        if packing is None:
            found = [i for batch in epoch_batches(examples, 3, 7, epoch, mix) for i in batch]
        else:
            rows = packed_batches(examples, 3, 7, epoch, packing, mix)
            found = [piece.example for batch in rows for row in batch for piece in row]
        assert sorted(found) == sorted(mix.drawn(7, epoch)) and len(found) == 20
    count = 7 if packing is None else len(packed_batches(examples, 3, 7, 0, packing, mix))
    ids = [
        token
        for batch in itertools.islice(steps(examples, 3, 7, 0, packing, mix), count)
        for row in batch
        for token in row.ids
    ]
    assert sorted(ids) == sorted(token for i in mix.drawn(7, 0) for token in examples[i].ids)


def test_the_order_of_rows_is_drawn_anew_though_the_examples_are_all_alike():
    examples = [Example([i] * 5, [i] * 5) for i in range(30)]  # one a row, so that packing leaves their order alone
    first, second = (packed_batches(examples, 1, seed, 0, Packing(5, "bfd")) for seed in (0, 1))
    assert first != second


def test_examples_in_arrays_give_the_same_batches():
    examples = some(22)
    kept = Examples.of(examples, 22, 0)
    assert epoch_batches(kept, 4, 7, 0) == epoch_batches(examples, 4, 7, 0)
    assert lengths_of(kept) == lengths_of(examples) == [len(each.ids) for each in examples]
    assert all(type(length) is int for length in lengths_of(kept))


def test_a_batch_says_which_of_its_tokens_are_mixed_in():
    task, mixed = Example([1, 2], [1, 2]), Example([3, 4, 5], [3, 4, 5], mixed=(0,))
    batch = collate([joined([task, mixed, task]), mixed, task], pad=0)
    assert batch["mixed"].dtype == torch.bool
    assert batch["mixed"].int().tolist() == [[0, 0, 1, 1, 1, 0, 0, 0], [1, 1, 1, 0, 0, 0, 0, 0], [0] * 8]
    assert collate([mixed], pad=0, left=True)["mixed"].int().tolist() == [[0, 0, 0, 0, 0, 1, 1, 1]]
    assert "mixed" not in collate([task], pad=0)

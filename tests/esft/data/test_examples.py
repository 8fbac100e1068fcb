import numpy as np
import pytest
import torch

from esft.data.examples import IGNORE, Example, Examples, joined

SOME = [Example([5, 6, 7], [IGNORE, 6, 7]), Example([8], [8]), Example([9, 10], [IGNORE, IGNORE])]


def test_examples_are_what_they_were_made_of():
    examples = Examples.of(iter(SOME), records=7, truncated=2)
    assert list(examples) == SOME and len(examples) == 3
    assert (examples[-1], examples[0:2], examples[5:]) == (SOME[2], SOME[:2], [])
    assert (examples.records, examples.truncated) == (7, 2)
    assert examples.lengths.tolist() == [3, 1, 2]
    with pytest.raises(IndexError):
        examples[3]


def test_a_position_without_loss_has_the_label_that_pytorch_passes_over():
    assert torch.nn.CrossEntropyLoss().ignore_index == IGNORE


def test_no_examples_are_none():
    assert list(Examples.of([], 0, 0)) == []


def test_a_token_takes_five_bytes():
    examples = Examples.of(SOME, 3, 0)
    assert (examples.ids.dtype, examples.counted.dtype) == (np.int32, np.bool_)
    assert examples.ids.nbytes + examples.counted.nbytes == 5 * 6


def test_targets_are_labels_that_something_comes_before():
    assert [example.targets for example in SOME] == [2, 0, 0]


def test_documents_end_to_end_keep_their_labels_but_for_their_first_ones():
    row = joined([SOME[0], SOME[1], Example([1, 2], [1, 2])])
    assert row == Example([5, 6, 7, 8, 1, 2], [IGNORE, 6, 7, IGNORE, IGNORE, 2], (0, 3, 4))
    assert row.targets == 3 == sum(document.targets for document in (SOME[0], SOME[1], Example([1, 2], [1, 2])))
    assert joined([SOME[1]]) == SOME[1]
    assert joined([SOME[2], row]).starts == (0, 2, 5, 6)


def test_a_part_has_the_tokens_and_labels_from_one_place_to_another():
    assert SOME[0].cut(1, 3) == Example([6, 7], [6, 7])


def test_documents_that_are_mixed_in_are_known_in_whatever_row_they_come_to_lie():
    task, mixed = Example([1, 2], [1, 2]), Example([3, 4, 5], [3, 4, 5], mixed=(0,))
    row = joined([mixed, task, mixed])
    assert row.starts == (0, 3, 5) and row.mixed == (0, 2)
    assert joined([task, row]).mixed == (1, 3) and joined([task, task]).mixed == ()
    assert mixed.cut(1, 3) == Example([4, 5], [4, 5], mixed=(0,)) and task.cut(0, 1).mixed == ()


def test_examples_from_one_on_are_mixed_in():
    plain = Examples.of([Example([n, n], [n, n]) for n in range(4)], 4, 0)
    found = Examples(plain.ids, plain.counted, plain.ends, 4, 0, mixed_from=3)
    assert [example.mixed for example in found] == [(), (), (), (0,)]
    assert [example.mixed for example in plain] == [()] * 4

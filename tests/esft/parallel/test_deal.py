"""Which rank gets which rows."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esft.parallel.deal import dealt


@given(st.lists(st.integers(0, 100)), st.integers(1, 9))
def test_every_row_is_dealt_once_and_no_rank_exceeds_another_by_more_than_a_row(lengths: list[int], ranks: int):
    shares = dealt(lengths, ranks)
    assert len(shares) == ranks and sorted(i for share in shares for i in share) == list(range(len(lengths)))
    assert all(share == sorted(share) for share in shares)
    tokens = [sum(lengths[i] for i in share) for share in shares]
    assert max(tokens) - min(tokens) <= max(lengths, default=0)


@pytest.mark.parametrize(
    ("lengths", "shares"),
    [
        ([3, 3, 3, 3], [[0, 2], [1, 3]]),
        ([9, 1, 2, 3], [[0], [1, 2, 3]]),
        ([1, 2, 9], [[2], [0, 1]]),
        ([5], [[0], []]),
        ([0, 0], [[0], [1]]),
    ],
)
def test_the_longest_row_that_is_left_goes_to_the_rank_with_the_fewest_tokens(lengths, shares):
    assert dealt(lengths, 2) == shares

import random

import pytest

from esft.data.examples import IGNORE, Example
from esft.data.packing import Piece, laid, packed


def drawn(count: int, longest: int, seed: int = 0) -> list[int]:
    return [random.Random(f"{seed}/{i}").randint(1, longest) for i in range(count)]


def test_the_longest_opens_a_row_and_the_best_fit_closes_it():
    rows = packed([5, 3, 6, 2, 1, 3], range(6), 8, "bfd")
    assert [[piece.example for piece in row] for row in rows] == [[2, 3], [0, 5], [1, 4]]
    assert rows[0] == [Piece(2, 0, 6), Piece(3, 0, 2)]


def test_two_close_a_row_where_they_leave_less_than_one():
    rows = packed([6, 3, 2, 2, 5], range(5), 10, "bfd")
    assert [[piece.end for piece in row] for row in rows] == [[6, 2, 2], [5, 3]]
    # Of a length that only one is left of there are no two.
    assert [[piece.end for piece in row] for row in packed([6, 2, 1], range(3), 10, "bfd")] == [[6, 2, 1]]


def test_what_is_neither_first_nor_last_in_a_row_comes_in_order():
    rows = packed([9, 1, 2, 3, 1, 2, 3, 1, 2, 3], [0, 3, 7, 2, 9, 4, 5, 1, 6, 8], 20, "bfd")
    assert [piece.example for piece in rows[0]][:3] == [0, 3, 7]


@pytest.mark.parametrize("strategy", ["bfd", "wrapped"])
def test_rows_hold_every_token_once_and_no_more_than_fit(strategy: str):
    lengths = drawn(300, 50)
    rows = packed(lengths, range(300), 50, strategy)
    assert all(0 < sum(piece.end - piece.start for piece in row) <= 50 for row in rows)
    tokens = [(piece.example, at) for row in rows for piece in row for at in range(piece.start, piece.end)]
    assert sorted(tokens) == [(i, at) for i, length in enumerate(lengths) for at in range(length)]


def test_what_is_longer_than_a_row_is_cut_or_goes_on_in_the_next():
    assert packed([7, 2], [0, 1], 5, "bfd") == [[Piece(0, 0, 5)], [Piece(1, 0, 2)]]
    assert packed([7, 2], [0, 1], 5, "wrapped") == [[Piece(0, 0, 5)], [Piece(0, 5, 7), Piece(1, 0, 2)]]


def test_wrapped_rows_are_full_but_the_last():
    rows = packed(drawn(99, 30), range(99), 16, "wrapped")
    assert {sum(piece.end - piece.start for piece in row) for row in rows[:-1]} == {16}


def test_no_two_rows_would_fit_into_one():
    rows = packed(drawn(200, 50), range(200), 50, "bfd")
    sizes = sorted(sum(piece.end for piece in row) for row in rows)
    assert sizes[0] + sizes[1] > 50


@pytest.mark.parametrize("strategy", ["bfd", "wrapped"])
def test_another_order_gives_other_rows(strategy: str):
    lengths = drawn(200, 9)
    one, other = (packed(lengths, random.Random(s).sample(range(200), 200), 32, strategy) for s in (1, 2))
    assert one != other


def test_an_example_may_come_twice():
    (row,) = packed([3], [0, 0], 8, "bfd")
    assert row == [Piece(0, 0, 3)] * 2


def test_short_records_of_about_the_same_length_leave_at_most_2_percent_of_their_rows_empty():
    """As commands and their answers are: a quarter of a row is too much for four of them, and too little for five."""
    lengths = [round(random.Random(i).gauss(57, 11)) for i in range(12_000)]
    rows = packed(lengths, range(12_000), 256, "bfd")
    assert 1 - sum(lengths) / (256 * len(rows)) <= 0.02


def test_records_of_20_to_4000_tokens_leave_at_most_3_percent_of_their_rows_empty():
    lengths = [random.Random(i).randint(20, 4000) for i in range(2000)]
    rows = packed(lengths, range(2000), 4096, "bfd")
    assert 1 - sum(lengths) / (4096 * len(rows)) <= 0.03


def test_a_row_has_the_tokens_of_its_pieces():
    examples = [Example([1, 2, 3], [1, 2, 3]), Example([4, 5], [IGNORE, 5])]
    assert laid([Piece(1, 0, 2), Piece(0, 1, 3)], examples) == Example([4, 5, 2, 3], [IGNORE, 5, IGNORE, 3], (0, 2))
    assert laid([Piece(0, 0, 3)], examples) == examples[0]


def test_the_first_of_the_order_comes_first_after_the_opener():
    rows = packed([1, 2, 9, 1, 2, 3], range(6), 20, "bfd")
    assert [piece.example for piece in rows[0]][:2] == [2, 0]


def test_of_what_leaves_equally_little_two_short_ones_close_a_row():
    """So the longer one, which fits into fewer rows, is not what is left at the end."""
    rows = packed([7, 6, 3, 3], range(4), 14, "bfd")
    assert [[piece.end for piece in row] for row in rows] == [[7, 3, 3], [6]]


def test_what_just_fits_is_in_the_row():
    assert packed([5, 3], [0, 1], 8, "bfd") == [[Piece(0, 0, 5), Piece(1, 0, 3)]]
    assert len(packed([5, 4], [0, 1], 8, "bfd")) == 2

from collections import Counter

import pytest

import esft
from esft.data.examples import Example, Examples
from esft.data.mixing import Mix, end_to_end, mixed_in, mixed_weights, weights_of
from esft.data.sources import DataSource


def some(*lengths: int) -> Examples:
    return Examples.of([Example([n] * n, [n] * n) for n in lengths], len(lengths) + 1, 1)


def test_sources_end_to_end_have_all_examples_and_counts():
    both = end_to_end([some(1, 2), some(3)])
    assert [example.ids for example in both] == [[1], [2, 2], [3, 3, 3]]
    assert (both.records, both.truncated, both.lengths.tolist()) == (5, 2, [1, 2, 3])


def test_all_sources_have_weights_or_none_has():
    assert weights_of([DataSource("a", weight=0.7), DataSource("b", weight=2)]) == [0.7, 2]
    assert weights_of([DataSource("a"), DataSource("b")]) is None
    with pytest.raises(esft.InputError, match="^b: has no weight, and other data has: give all a weight, as b:1$"):
        weights_of([DataSource("a", weight=0.7), DataSource("b")])


@pytest.mark.parametrize(("weights", "counts"), [([3, 1], (30, 10)), ([1, 1], (20, 20)), ([1, 999], (1, 40))])
def test_an_epoch_has_as_many_examples_of_each_source_as_its_weight_says(weights: list, counts: tuple):
    order = Mix([8, 32], weights).drawn(seed=0, epoch=3)
    assert (sum(i < 8 for i in order), sum(i >= 8 for i in order)) == counts
    assert set(order) <= set(range(40))


def test_a_source_is_gone_through_whole_before_it_comes_again():
    mix = Mix([8, 32], [3, 1])
    first = [i for epoch in range(4) for i in mix.drawn(0, epoch) if i < 8]
    assert set(Counter(first).values()) == {15} and set(first[:8]) == set(first[8:16]) == set(range(8))
    assert first[:8] != first[8:16]
    second = [i for epoch in range(4) for i in mix.drawn(0, epoch) if i >= 8]
    assert second[:32] != sorted(second[:32]) and set(second[:32]) == set(range(8, 40))


def test_what_is_drawn_depends_on_seed_and_epoch_alone():
    mix = Mix([8, 32], [3, 1])
    assert mix.drawn(1, 2) == mix.drawn(1, 2) != mix.drawn(2, 2)


def test_sources_of_one_size_have_orders_of_their_own():
    order = Mix([16, 16], [1, 1]).drawn(0, 0)
    assert [i for i in order if i < 16] != [i - 16 for i in order if i >= 16]


def test_each_epoch_goes_on_where_the_one_before_it_ended():
    mix = Mix([5, 5], [3, 2])
    drawn = [i for epoch in range(5) for i in mix.drawn(0, epoch) if i < 5]
    assert len(drawn) == 30 and all(set(drawn[start : start + 5]) == set(range(5)) for start in range(0, 30, 5))


def test_the_last_of_several_sources_may_be_mixed_in():
    assert [example.mixed for example in end_to_end([some(1, 2), some(3)], mixed=True)] == [(), (), (0,)]
    assert [example.mixed for example in end_to_end([some(1, 2), some(3)])] == [()] * 3


@pytest.mark.parametrize("weights", [None, [3.0, 1.0]])
def test_what_is_mixed_in_has_its_share_whatever_the_sizes_and_the_others_keep_their_proportions(weights):
    sizes = [30, 10, 360]
    found = mixed_weights(sizes, weights, 0.25)
    assert found == pytest.approx([0.75 * 0.75, 0.75 * 0.25, 0.25])
    order = Mix(sizes, found).drawn(0, 0)
    assert Counter(0 if i < 30 else 1 if i < 40 else 2 for i in order) == {0: 225, 1: 75, 2: 100}
    if weights is None:  # each example of the task as often as the others, but for one
        assert set(Counter(i for i in order if i < 40).values()) <= {7, 8}


def test_what_is_mixed_in_is_given_with_a_share_below_one():
    assert mixed_in("general.jsonl:0.25") == DataSource("general.jsonl", None, 0.25)
    for text in ("general.jsonl", "general.jsonl:1", "general.jsonl:25"):
        with pytest.raises(
            esft.InputError, match=f"^{text}: mixed in is a share of the records below 1, as general.jsonl:0.25$"
        ):
            mixed_in(text)

import pytest
import torch

from esft.checkpoint.views import WHOLE, Link, Part, Strided, part_that_reads, strided

ROWS = {"all": [0, 1, 2, 3], "first half": [0, 1], "second half": [2, 3], "in turn": [0, 2, 1, 3]}


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("rows", "numbers"), ROWS.items())
def test_what_is_read_can_be_written_back(rows: str, numbers: list[int], transposed: bool):
    weight = torch.randn(5, 4) if transposed else torch.randn(4, 5)
    part = Part(rows, transposed)
    value = part.read(weight)
    assert torch.equal(value, (weight.T if transposed else weight)[numbers])
    before, new = weight.clone(), torch.randn(value.shape)
    part.write(weight, new)
    assert torch.equal(part.read(weight), new)
    others = [row for row in range(4) if row not in numbers]
    assert torch.equal(*((w.T if transposed else w)[others] for w in (weight, before)))


def test_what_is_read_is_a_view_where_that_can_be():
    weight = torch.zeros(4, 5)
    for rows in ("all", "first half", "second half"):
        Part(rows, True).read(weight[:, :4])[:] += 1
    assert torch.equal(weight[:, :4], torch.full((4, 4), 2.0))
    value = torch.arange(8).view(2, 4)
    WHOLE.write(weight[:2, :4], value.flatten())  # of the same elements
    assert torch.equal(weight[:2, :4], value.float())


def test_the_whole_is_all_rows_as_they_are():
    assert Part("all", False) == WHOLE
    weight = torch.zeros(3)
    assert WHOLE.read(weight) is weight


NUMBERS = torch.arange(24).view(4, 6)
SELECTIONS = {
    "whole": NUMBERS,
    "rows": NUMBERS[1:3],
    "columns": NUMBERS[:, 2:5],
    "transposed": NUMBERS.T,
    "rows in turn": NUMBERS.unflatten(0, (2, 2)).transpose(0, 1).flatten(0, 1),
    "heads permuted": NUMBERS.view(2, 2, 6).transpose(0, 1).reshape(4, 6)[:2],
    "one": NUMBERS[2, 3],
}


@pytest.mark.parametrize("name", SELECTIONS)
def test_elements_that_are_strided_are_read_and_written_without_numbers(name: str):
    numbers = SELECTIONS[name]
    found = strided(numbers.flatten(), tuple(numbers.shape))
    assert found is not None
    tensor = torch.randn(5, 6)[1:]  # which begins within its storage
    assert torch.equal(found.read(tensor), tensor.flatten()[numbers])
    value, expected = torch.randn(numbers.shape), tensor.clone()
    expected.view(-1)[numbers.flatten()] = value.flatten()
    found.write(tensor, value)
    assert torch.equal(tensor, expected)


@pytest.mark.parametrize(
    ("numbers", "sizes", "strides", "offset"),
    [
        ([7], (), (), 7),
        ([3, 4, 5], (3,), (1,), 3),
        ([2, 7, 12], (3,), (5,), 2),
        ([0, 1, 10, 11, 20, 21], (3, 2), (10, 1), 0),
        ([1, 5, 3, 7], (2, 2), (2, 4), 1),
        ([0, 3, 1, 4, 20, 23, 21, 24], (2, 2, 2), (20, 1, 3), 0),
        ([4, 4, 4], (3,), (0,), 4),
    ],
)
def test_loops_are_told_from_the_numbers_that_they_count(numbers: list[int], sizes, strides, offset: int):
    found = strided(torch.tensor(numbers), (1, len(numbers)))
    assert found == Strided((1, len(numbers)), sizes, strides, offset)
    assert all(type(n) is int for n in (*found.sizes, *found.strides, found.offset))
    tensor = torch.arange(30.0)
    assert torch.equal(found.read(tensor), torch.tensor([numbers], dtype=torch.float32))


def test_a_tensor_that_does_not_lie_in_order_is_an_error_and_not_read_wrongly():
    some = Strided((2,), (2,), (1,), 0)
    with pytest.raises(RuntimeError, match="view"):
        some.read(torch.zeros(3, 2).T)
    with pytest.raises(RuntimeError, match="view"):
        some.write(torch.zeros(3, 2).T, torch.ones(2))


@pytest.mark.parametrize(
    "numbers",
    [
        [0, 1, 3],
        [3, 2, 1],
        [0, 1, 4, 5, 7, 8],
        [0, 2, 1, 3, 5, 4],
        [0, 1, 10, 12],  # whose first loop changes its step
        [0, 1, 10, 11, 20, 22],
        [0, 1, 10, 11, 5, 6],  # whose second goes back
        [10, 11, 0, 1],
    ],
)
def test_elements_that_are_not_strided_are_told(numbers: list[int]):
    assert strided(torch.tensor(numbers), (len(numbers),)) is None


# The second column of a [3, 2] weight, and the last three elements of a stored tensor of five.
INSIDE, OUTSIDE = Strided((3,), (3,), (2,), 1), Strided((3,), (3,), (1,), 2)


@pytest.mark.parametrize(
    ("inside", "expected"),
    [
        (WHOLE, [[0, 1], [2, 3], [4, 5], [6, 7]]),
        (Strided((4,), (4,), (2,), 1), [1, 3, 5, 7]),
        (Part("second half"), [[4, 5], [6, 7]]),
        (Part("in turn", transposed=True), [[0, 2, 4, 6], [1, 3, 5, 7]]),
    ],
)
def test_a_link_stores_its_elements_of_the_weight_and_loads_them_back(inside, expected: list):
    weight, link = torch.arange(8.0).view(4, 2), Link("w", None, inside)
    value = torch.zeros(torch.tensor(expected).shape)
    link.store(weight, value)
    assert value.tolist() == expected
    other = torch.full((4, 2), -1.0)
    link.load(other, value + 10)
    numbers = torch.tensor(expected).flatten()
    wanted = torch.full((8,), -1.0)
    wanted[numbers] = numbers + 10.0
    assert torch.equal(other.flatten(), wanted)
    assert torch.equal(weight, torch.arange(8.0).view(4, 2))  # only what it was told to write to


def test_a_link_touches_only_its_own_elements_of_a_tensor_that_holds_more():
    weight = torch.tensor([[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]])
    link = Link("w", None, INSIDE, OUTSIDE)
    value = torch.full((5,), -1.0)
    link.store(weight, value)
    assert value.tolist() == [-1, -1, 1, 3, 5]
    link.load(weight, torch.arange(10.0).view(5, 2)[:, 1])  # not contiguous: 1, 3, 5, 7, 9
    assert weight.tolist() == [[0, 5], [2, 7], [4, 9]]


def test_a_whole_weight_may_be_a_part_of_a_stored_tensor():
    weight, link = torch.tensor([[7.0], [8.0], [9.0]]), Link("w", None, WHOLE, OUTSIDE)
    value = torch.zeros(5)
    link.store(weight, value)
    assert value.tolist() == [0, 0, 7, 8, 9]
    link.load(weight, torch.arange(5.0))
    assert weight.tolist() == [[2], [3], [4]]


@pytest.mark.parametrize("part", [Part(rows, transposed) for transposed in (False, True) for rows in ROWS], ids=str)
def test_a_part_is_found_by_what_it_reads(part: Part):
    tensor = torch.arange(12).view(*((3, 4) if part.transposed else (4, 3)))  # halves in one direction only
    assert part_that_reads(tensor, part.read(tensor)) == part


def test_what_no_part_reads_is_not_found():
    tensor = torch.arange(24).view(4, 6)
    assert part_that_reads(tensor, tensor.flip(0)) is None
    odd = torch.arange(3)  # has no halves
    assert part_that_reads(odd, odd[:2]) is None and part_that_reads(odd, odd) == WHOLE

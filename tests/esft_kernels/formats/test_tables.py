import pytest
import torch

from esft_kernels.formats import mxfp4, nf4
from esft_kernels.formats.tables import bins_of, count_below, look_up, pairs

CPU, VALUES = torch.device("cpu"), (1.5, -2.0, 0.0, float("nan"))


def test_an_index_names_two_codes_and_finds_their_values():
    index = torch.tensor([0b0001, 0b1000, 0b0110], dtype=torch.uint8)
    high_first = look_up(index, pairs(VALUES, True, CPU))
    assert high_first.dtype == torch.float32 and high_first.tolist() == [1.5, -2.0, 0.0, 1.5, -2.0, 0.0]
    low_first = look_up(index, pairs(VALUES, False, CPU))
    assert low_first.tolist() == [-2.0, 1.5, 1.5, 0.0, 0.0, -2.0]


def test_every_bit_of_a_value_is_kept():
    (first, second) = look_up(torch.tensor([0b1110], dtype=torch.uint8), pairs(VALUES, True, CPU))
    assert first.isnan() and second == 0


def test_tables_are_made_once():
    assert pairs(VALUES, True, CPU) is pairs(VALUES, True, CPU)


@pytest.mark.parametrize("edges", [(0.5, 1.5), (-1.0, -0.99, 0.0, 3.0), nf4._EDGES, mxfp4._EDGES])
def test_edges_below_a_value_are_counted_as_by_bucketize(edges):
    line = torch.tensor(edges)
    values = torch.cat(
        [line, line.nextafter(line + 1), line.nextafter(line - 1), torch.linspace(-20, 20, 40_001), torch.zeros(1)]
    )
    found = count_below(values, bins_of(edges, values.device))
    assert found.dtype == torch.uint8
    assert torch.equal(found.long(), torch.bucketize(values, line))


def test_edges_too_close_for_the_table_are_refused():
    with pytest.raises(ValueError, match="too close"):
        bins_of((0.0, 1e-6, 1.0), torch.device("cpu"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_values_are_float32_whatever_the_default_is(dtype):
    torch.set_default_dtype(dtype)
    try:
        table = pairs((0.1, 0.3), True, CPU)
    finally:
        torch.set_default_dtype(torch.float32)
    assert look_up(torch.tensor([0b01], dtype=torch.uint8), table).tolist() == torch.tensor([0.1, 0.3]).tolist()


def test_a_table_lies_where_its_codes_do():
    assert pairs((0.5, 1.0), True, torch.device("meta")).device.type == "meta"

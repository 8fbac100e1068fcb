import pytest
import torch

from esft_kernels.formats.tables import look_up, pairs

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

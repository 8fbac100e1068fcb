import pytest

from benchmarks.data import encoding, padding
from tests.esft.models import save_tiny, write_records


def test_encoding_is_measured_both_times_and_beside_the_way_from_prefix_to_prefix(tmp_path):
    row = encoding(str(save_tiny(tmp_path / "base")), 100, 4, None)
    assert (row["records"], row["processes"]) == (100, 1)
    assert 10 < row["tokens a record"] < 100
    assert 0 < row["again"] < row["seconds"] and row["prefix by prefix"] > 0


def test_padding_is_told_of_the_data_and_of_drawn_lengths(tmp_path):
    own, drawn = padding(str(save_tiny(tmp_path / "base")), write_records(tmp_path / "d.jsonl"), 64, 4)
    assert own["padding"] == pytest.approx(own["padding"]) and 0 <= own["bfd"] < own["padding"] < 1
    assert drawn["bfd"] <= 0.03 and drawn["wrapped"] <= 0.01 < drawn["padding"]

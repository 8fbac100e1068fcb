import pytest
import torch

pytest.importorskip("triton")
from esft_kernels.mainloop import block_of, precision, wide


def test_64_bit_offsets_from_the_first_element_that_32_bits_do_not_reach():
    assert not wide(torch.empty(2**20, 2047, device="meta"))
    assert wide(torch.empty(8, device="meta"), torch.empty(2**20, 2048, device="meta"))


def test_tf32_only_where_it_is_allowed(monkeypatch):
    single, half = torch.empty(1, device="meta"), torch.empty(1, device="meta", dtype=torch.bfloat16)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    assert precision(single) == precision(half) == "ieee"
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    assert precision(single) == "tf32" and precision(half) == "ieee"


def test_blocks_of_positions():
    assert [block_of(n) for n in (0, 1, 64, 65, 512)] == [64, 64, 64, 128, 512]

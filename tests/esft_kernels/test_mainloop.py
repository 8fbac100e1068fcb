import pytest
import torch

pytest.importorskip("triton")
from esft_kernels.mainloop import block_of, precision, wide

from esft_kernels import tiles


def test_64_bit_offsets_from_the_first_element_that_32_bits_do_not_reach():
    assert not wide(torch.empty(2**20, 2047, device="meta"))
    assert wide(torch.empty(8, device="meta"), torch.empty(2**20, 2048, device="meta"))


@pytest.mark.parametrize("arch", ["sm_90", "gfx942", "gfx950"])
@pytest.mark.parametrize(("setting", "allowed"), [("ieee", False), ("tf32", True)])
def test_tf32_only_where_it_is_allowed_and_exists(setting, allowed, arch, monkeypatch):
    monkeypatch.setattr(tiles, "device_arch", lambda device: arch)
    single, half = torch.empty(1, device="meta"), torch.empty(1, device="meta", dtype=torch.bfloat16)
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = setting
    try:
        assert precision(single) == ("tf32" if allowed and arch != "gfx950" else "ieee") and precision(half) == "ieee"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_blocks_of_positions():
    assert [block_of(n) for n in (0, 1, 256, 257, 512)] == [256, 256, 256, 512, 512]

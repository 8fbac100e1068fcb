import torch

from esft_kernels.formats import int8
from esft_kernels.formats.int8 import Int8


def test_the_largest_weight_of_a_group_is_exact_and_others_are_off_by_half_a_step_at_most():
    torch.manual_seed(0)
    weights = torch.randn(1, 6, 192)
    codes, scales = Int8().quantize(weights)
    assert codes.dtype == torch.int8 and codes.shape == (1, 6, 192) and scales.shape == (1, 6, 3)
    assert codes.view(1, 6, 3, 64).abs().amax(dim=-1).unique().tolist() == [127]
    off = codes.view(1, 6, 3, 64) * scales[..., None] - weights.view(1, 6, 3, 64)
    assert (off.abs() <= scales[..., None] * 0.5001).all()


def test_a_rows_last_group_is_padded_and_not_shared_with_the_next_row():
    weights = torch.cat([torch.full((1, 1, 70), 1.0), torch.full((1, 1, 70), 100.0)], dim=1)
    codes, scales = Int8().quantize(weights)
    assert codes.shape == (1, 2, 128) and not codes[..., 70:].any()
    assert torch.allclose(scales, torch.tensor([[[1.0, 1.0], [100.0, 100.0]]]) / 127)
    out = torch.empty(Int8().buffer_size(2, 70))
    assert torch.allclose(Int8().decode([codes[0], scales[0]], 2, 70, out), weights[0])


def test_a_matrix_is_kept_in_whole_numbers():
    codes, scales = Int8().encode(torch.tensor([[0.2, -1.27, 1.0]]))
    assert codes[0, :3].tolist() == [20, -127, 100] and codes.dtype == torch.int8
    assert scales.dtype == torch.float32


def test_the_last_rows_of_a_large_matrix_are_read_like_the_first(monkeypatch):
    monkeypatch.setattr(int8, "PIECE", 128)
    weights = torch.randn(1, 5, 64)
    codes, scales = Int8().quantize(weights)
    found = Int8().decode([codes[0], scales[0]], 5, 64, torch.full((320,), float("nan")))
    assert torch.equal(found, codes[0].float() * scales[0])

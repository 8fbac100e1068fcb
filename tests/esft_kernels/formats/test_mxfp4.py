import pytest
import torch

from esft_kernels.formats.mxfp4 import VALUES, Mxfp4


def test_a_checkpoints_tensors_are_read_without_loss():
    """gpt-oss: low bits first, the value of the 4-bit float times 2 ** (scale - 127)."""
    torch.manual_seed(0)
    blocks = torch.randint(0, 256, (6, 3, 16), dtype=torch.uint8)
    scales = torch.randint(0, 254, (6, 3), dtype=torch.uint8)
    scales[0] = torch.tensor([0, 1, 252])  # the smallest of all, and the largest that fits with 6
    values = torch.tensor(VALUES, dtype=torch.float64)
    codes = torch.stack([blocks & 15, blocks >> 4], dim=-1).view(6, 3, 32).long()
    expected = (values[codes] * 2.0 ** (scales.double() - 127)[..., None]).view(6, 96)
    for dtype in (torch.bfloat16, torch.float32):
        found = Mxfp4().decode([blocks, scales], 6, 96, torch.empty(6 * 96, dtype=dtype))
        assert torch.equal(found.double(), expected)


def test_agrees_with_transformers_conversion_of_gpt_oss():
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    torch.manual_seed(0)
    blocks = torch.randint(0, 256, (2, 6, 3, 16), dtype=torch.uint8)
    scales = torch.randint(100, 140, (2, 6, 3), dtype=torch.uint8)
    expected = convert_moe_packed_tensors(blocks.clone(), scales.clone(), dtype=torch.bfloat16)  # [E, in, out]
    for expert in range(2):
        out = torch.empty(6 * 96, dtype=torch.bfloat16)
        assert torch.equal(Mxfp4().decode([blocks[expert], scales[expert]], 6, 96, out), expected[expert].T)


def test_every_value_is_kept_and_ties_go_to_the_even_code():
    row = torch.tensor(
        [*VALUES, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -5.0, -0.25, 5.1, 0.2, 0.3, 4.9, 6.0, -2.5, 1.0]
    )
    blocks, scales = Mxfp4().quantize(row.view(1, 1, 32) * 0.25)
    assert scales.tolist() == [[[125]]]
    found = Mxfp4().decode([blocks[0], scales[0]], 1, 32, torch.empty(32)).view(-1) / 0.25
    expected = [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, -4.0, 0.0, 6.0, 0.0, 0.5, 4.0, 6.0, -2.0, 1.0]
    assert found.tolist() == [*VALUES, *expected]


def test_weights_past_the_largest_code_are_held_at_it():
    blocks, scales = Mxfp4().quantize(torch.full((1, 1, 32), 7.9))
    assert scales.tolist() == [[[127]]]
    assert set(Mxfp4().decode([blocks[0], scales[0]], 1, 32, torch.empty(32)).view(-1).tolist()) == {6.0}


def test_a_checkpoints_scale_that_is_no_number_is_found():
    blocks, scales = torch.zeros(2, 3, 1, 16, dtype=torch.uint8), torch.full((2, 3, 1), 254, dtype=torch.uint8)
    Mxfp4().check_values([blocks, scales], "down")  # the largest power of two
    scales[1, 2, 0] = 255
    with pytest.raises(ValueError, match="^down: a scale of mxfp4 is not finite$"):
        Mxfp4().check_values([blocks, scales], "down")


def test_a_larger_buffer_is_filled_from_its_front():
    blocks, scales = Mxfp4().quantize(torch.ones(1, 2, 40))
    out = torch.full((200,), float("nan"))
    found = Mxfp4().decode([blocks[0], scales[0]], 2, 40, out)
    assert torch.equal(found, torch.ones(2, 40)) and found.data_ptr() == out.data_ptr()
    assert out[128:].isnan().all() and Mxfp4().buffer_size(2, 40) == 128


def test_nothing_leaves_the_device():
    parts = Mxfp4().encode(torch.empty(4, 96, device="meta"))
    assert {part.device.type for part in parts} == {"meta"}
    assert Mxfp4().decode(parts, 4, 96, torch.empty(384, device="meta")).device.type == "meta"

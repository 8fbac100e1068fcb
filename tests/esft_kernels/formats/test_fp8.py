import pytest
import torch

from esft_kernels.formats.fp8 import VALUES, Fp8


def test_a_checkpoints_tensors_are_read_without_loss():
    """DeepSeek-V3's dequantisation: weight in float32, times its block's weight_scale_inv, then the model's dtype."""
    torch.manual_seed(0)
    weight = torch.randn(256, 384).to(torch.float8_e4m3fn)
    scale_inv = torch.rand(2, 3) * 1e-3
    expected = weight.float() * scale_inv.repeat_interleave(128, 0).repeat_interleave(128, 1)
    for dtype in (torch.bfloat16, torch.float32):
        found = Fp8().decode([weight, scale_inv], 256, 384, torch.empty(256 * 384, dtype=dtype))
        assert torch.equal(found, expected.to(dtype))


@pytest.mark.parametrize("columns", [16, 1], ids=["through the table", "converted"])
def test_every_code_has_its_value(columns):
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).view(-1, columns)
    rows = len(codes)
    scales = torch.ones(-(-rows // 128), 1)
    found = Fp8().decode([codes, scales], rows, columns, torch.empty(256))
    assert torch.equal(found.flatten().nan_to_num(1e9), torch.tensor(VALUES).nan_to_num(1e9))
    assert max(v for v in VALUES if v == v) == 448 and sum(v != v for v in VALUES) == 2


def test_what_came_in_fp8_is_quantized_to_the_same_weights():
    torch.manual_seed(0)
    weights = torch.randn(1, 128, 256).to(torch.float8_e4m3fn).float()
    weights[0, 0, ::128] = 448  # so that a block's scale is 1
    codes, scales = Fp8().quantize(weights * 0.5)
    assert torch.equal(scales, torch.full((1, 1, 2), 0.5)) and torch.equal(codes.float(), weights)


def test_gate_and_up_of_a_checkpoint_can_be_stacked_with_their_scales():
    torch.manual_seed(0)
    gate, up = Fp8().quantize(torch.randn(1, 256, 130)), Fp8().quantize(torch.randn(1, 256, 130))
    both = [torch.cat(pair, dim=1) for pair in zip(gate, up, strict=True)]
    Fp8().check(both, 1, 512, 130, "gate_up")
    found = Fp8().decode([t[0] for t in both], 512, 130, torch.empty(512 * 130))
    for half, tensors in zip(found.chunk(2), (gate, up), strict=True):
        assert torch.equal(half, Fp8().decode([t[0] for t in tensors], 256, 130, torch.empty(256 * 130)))


def test_blocks_at_the_edges_are_short_and_have_scales_of_their_own():
    weights = torch.zeros(1, 130, 200)
    weights[0, :128, 128:], weights[0, 128:, :128], weights[0, 128:, 128:] = -7.0, 14.0, 28.0
    weights[0, 129, 199] = -56.0
    codes, scales = Fp8().quantize(weights)
    assert codes.shape == (1, 130, 200) and (scales * 448).tolist() == [[[0.0, 7.0], [14.0, 56.0]]]
    assert codes[0, ::129, ::199].tolist() == [[0.0, -448.0], [448.0, -448.0]] and codes[0, 128, 199] == 224
    assert torch.equal(Fp8().decode([codes[0], scales[0]], 130, 200, torch.empty(130 * 200)), weights[0])


def test_nothing_leaves_the_device():
    parts = Fp8().encode(torch.empty(4, 96, device="meta"))
    assert {part.device.type for part in parts} == {"meta"}
    assert Fp8().decode(parts, 4, 96, torch.empty(384, device="meta")).device.type == "meta"


def test_rows_of_an_odd_number_of_weights_are_read_like_others():
    for columns in (3, 33, 131):
        codes, scales = Fp8().quantize(torch.randn(1, 5, columns))
        expected = codes[0].float() * scales[0].repeat_interleave(128, 1)[:, :columns]
        assert torch.equal(Fp8().decode([codes[0], scales[0]], 5, columns, torch.empty(5 * columns)), expected)

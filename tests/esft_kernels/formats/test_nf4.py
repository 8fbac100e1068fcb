import os
import subprocess
import sys

import pytest
import torch

from esft_kernels.formats import nf4
from esft_kernels.formats.nf4 import VALUES, Nf4, Nf4Double


@pytest.fixture
def library():
    pytest.importorskip("bitsandbytes")
    decode = nf4.bitsandbytes()
    assert decode is not None
    return decode


def decoded(tensors, rows, columns, dtype):
    kind = Nf4()
    return kind.decode(
        [t[0] for t in tensors], rows, columns, torch.empty(kind.buffer_size(rows, columns), dtype=dtype)
    )


@pytest.mark.parametrize("size", [(8, 96), (3, 67), (64, 64), (1, 5), (130, 4099)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_with_bitsandbytes_and_without_it_the_bits_are_the_same(library, size, dtype, monkeypatch):
    torch.manual_seed(0)
    tensors = Nf4().quantize(torch.randn(1, *size))
    found = decoded(tensors, *size, dtype).clone()
    monkeypatch.setattr(nf4, "bitsandbytes", lambda: None)
    assert torch.equal(found, decoded(tensors, *size, dtype))


def test_codes_and_scales_are_those_of_bitsandbytes(library):
    from bitsandbytes.functional import get_4bit_type, quantize_4bit

    torch.manual_seed(0)
    weights = torch.randn(1, 96, 200)
    codes, state = quantize_4bit(weights[0], blocksize=64, quant_type="nf4")
    mine, absmax = Nf4().quantize(weights)
    assert torch.equal(absmax[0], state.absmax) and torch.equal(mine[0], codes.view(-1))
    assert torch.equal(get_4bit_type("nf4", device="cpu"), torch.tensor(VALUES))


@pytest.mark.skipif(sys.platform != "linux", reason="looks at the modules of a fresh process")
def test_bitsandbytes_is_imported_without_asking_the_hub_and_without_a_word(library):
    code = (
        "import sys, types\n"
        "kernels = types.ModuleType('kernels')\n"
        "kernels.get_kernel = lambda *args, **kwargs: print('asked the hub')\n"
        "sys.modules['kernels'] = kernels\n"
        "from esft_kernels.formats.nf4 import bitsandbytes\n"
        "assert bitsandbytes() is not None and sys.modules['kernels'] is kernels\n"
        "del sys.modules['kernels']\n"
        "import logging\n"
        "assert 'bitsandbytes' in sys.modules and not logging.getLogger('bitsandbytes.backends.cpu.ops').disabled\n"
    )
    env = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_without_bitsandbytes_there_is_a_lookup(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    nf4.bitsandbytes.cache_clear()
    try:
        assert nf4.bitsandbytes() is None and "kernels" not in sys.modules
        weights = torch.tensor(VALUES).repeat(1, 8, 8)
        assert torch.equal(decoded(Nf4().quantize(weights), 8, 128, torch.float32), weights[0])
    finally:
        nf4.bitsandbytes.cache_clear()


def test_blocks_run_over_the_ends_of_rows_and_the_last_is_padded():
    weights = torch.zeros(1, 3, 40)
    weights[0, 1, 23], weights[0, 1, 24] = -2.0, 3.0  # the last of block 0 and the first of block 1
    codes, absmax = Nf4().quantize(weights)
    assert codes.shape == (1, 64) and absmax.tolist() == [[2.0, 3.0]]
    assert codes[0, 31] == 0x70 and codes[0, 32] == 0xF7


def test_scales_in_8_bits_cost_next_to_no_precision():
    torch.manual_seed(0)
    weights = torch.randn(2, 300, 256) * torch.tensor([1.0, 50.0]).view(2, 1, 1)
    plain, double = Nf4().quantize(weights), Nf4Double().quantize(weights)
    assert torch.equal(plain[0], double[0])
    _, absmax, scales, mean = double
    assert absmax.shape == (2, 1200) and scales.shape == (2, 5) and mean.shape == (2,)
    found = Nf4Double().scales(double)
    assert ((found - plain[1]).abs() / plain[1]).max() < 0.01
    assert torch.equal(found[1], Nf4Double().scales([t[1] for t in double]))


def test_the_scale_furthest_from_the_mean_takes_the_largest_code():
    torch.manual_seed(0)
    weights = torch.randn(1, 10, 64 * 30)  # 300 blocks: one group of 256 scales, and one of 44
    weights[0, 3, :64] = 0  # far below the mean
    weights[0, 9, -64:] *= 9  # far above it
    _, absmax, scales, mean = Nf4Double().quantize(weights)
    assert absmax[0, :256].abs().max() == absmax[0, 256:].abs().max() == 127
    whole = Nf4().quantize(weights)[1][0]
    assert torch.allclose(mean, whole.mean())
    apart = whole - mean
    assert torch.allclose(scales[0], torch.stack([apart[:256].abs().max(), apart[256:].abs().max()]) / 127)


@pytest.mark.parametrize("kind", [Nf4(), Nf4Double()], ids=lambda kind: kind.name)
def test_nothing_leaves_the_device(kind):
    parts = kind.encode(torch.empty(4, 96, device="meta"))
    assert {part.device.type for part in parts} == {"meta"}
    assert kind.decode(parts, 4, 96, torch.empty(384, device="meta")).device.type == "meta"


def test_bitsandbytes_decodes_on_a_cpu_and_in_the_dtypes_that_it_has(monkeypatch):
    asked = []

    def zeros(codes, absmax, dtype):
        asked.append(dtype)
        return torch.zeros(2 * codes.numel(), dtype=dtype)

    monkeypatch.setattr(nf4, "bitsandbytes", lambda: zeros)
    tensors = Nf4().quantize(torch.ones(1, 4, 64))
    for dtype in (torch.float32, torch.bfloat16):
        assert not decoded(tensors, 4, 64, dtype).any()
    assert decoded(tensors, 4, 64, torch.float64).all()
    Nf4().decode([t[0].to("meta") for t in tensors], 4, 64, torch.empty(256, device="meta"))
    assert asked == [torch.float32, torch.bfloat16]


def test_scales_in_8_bits_are_the_nearest_of_256_steps_around_their_mean():
    torch.manual_seed(0)
    weight = torch.randn(30, 1000) * torch.rand(30, 1).exp()
    exact, parts = Nf4().encode(weight)[1], Nf4Double().encode(weight)
    steps = parts[2].repeat_interleave(256)[: len(exact)]
    assert ((Nf4Double().scales(parts) - exact).abs() <= 0.5001 * steps).all()
    assert torch.allclose(parts[3], exact.mean()) and int(parts[1].abs().max()) == 127


def test_what_the_last_scales_are_padded_with_is_no_scale():
    weights = torch.ones(1, 260, 64)  # 260 blocks, of which the last four are a group alone
    weights[0, 256:] = 1.25
    _, absmax, scales, mean = Nf4Double().quantize(weights)
    assert torch.allclose(scales[0] * 127, torch.tensor([mean[0] - 1.0, 1.25 - mean[0]]), rtol=1e-4)
    assert absmax[0, 256:].tolist() == [127] * 4

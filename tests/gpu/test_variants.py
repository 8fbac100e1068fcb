"""Every other way to load and to walk over tiles: H ahead, descriptors, longer turns, programs that stay."""

from __future__ import annotations

import pytest
import torch

from esft_kernels.backend import Needs
from esft_kernels.triton_ops.tiles import choose_tiles, device_arch, variants, varied
from tests.esft_kernels.layers import GPT_OSS, make_layer
from tests.esft_kernels.test_fuzz import agrees
from tests.gpu.device import DEVICE, sized

NAMES = (
    "H ahead", "H later", "descriptors", "long turns", "persistent", "persistent descriptors", "persistent long turns"
)  # fmt: skip
LAYOUTS = {
    "gates before ups": {"hidden": sized(256, 32), "intermediate": sized(128, 16)},
    "gpt-oss": {
        "hidden": sized(64, 32), "intermediate": sized(256, 16), "activation": GPT_OSS, "interleaved": True,
        "transposed": True, "biased": True,
    },
}  # fmt: skip
# What descriptors cannot load: gates and ups that would be columns of a tile, not rows; and rows at any address.
PASSED_OVER = {
    "gates before ups, transposed": {"hidden": sized(128, 16), "intermediate": sized(64, 16), "transposed": True},
    "rows at any address": {"hidden": sized(33, 17), "intermediate": sized(20, 6)},
}
# Tokens and the experts that they use, of six: ragged; half of them without rows; no row at all; one token.
BATCHES = sized([(1700, range(6)), (20, (1, 2, 4)), (0, range(6)), (1, (0, 1, 5))], [(5, (1, 2, 3, 4)), (0, range(6))])


def check(name: str, **layout) -> None:
    for tokens, used in BATCHES:
        layer = make_layer(tokens, 3, 6, used=tuple(used), dtype=torch.bfloat16, **layout)
        with varied(name):
            agrees(layer.on(DEVICE), "triton", Needs(x=True, weights=True, trained=True), "none")


def test_every_one_is_tested_that_a_kernel_has_here():
    arch = device_arch(DEVICE)
    chosen = {op: choose_tiles(arch, torch.bfloat16, op, 850, (256, 256)) for op in ("up", "gemm", "grad", "wgrad")}
    assert {name for op, tiles in chosen.items() for name in variants(tiles, op, arch)} <= set(NAMES)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", sized(NAMES, ("persistent descriptors", "H ahead")))
def test_it_gives_what_the_reference_does(name, layout):
    check(name, **LAYOUTS[layout])


@pytest.mark.parametrize("layout", sized(list(PASSED_OVER), ["rows at any address"]))
def test_where_descriptors_cannot_load_pointers_do(layout):
    check("persistent descriptors", **PASSED_OVER[layout])

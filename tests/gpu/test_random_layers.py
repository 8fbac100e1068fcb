"""Random layers against the float64 reference: routings, pools and needs are drawn, what is compiled is listed."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from esft_kernels.autograd_op import RECOMPUTE
from esft_kernels.backend import Needs
from esft_kernels.backends import triton_parts as parts
from esft_kernels.pools import PLAIN
from tests.esft_kernels.layers import ACTIVATIONS, make_layer
from tests.esft_kernels.test_fuzz import agrees
from tests.gpu.device import DEVICE, sized

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Tiles follow the rows of an expert: up to 32, below 128 (on sm_90, elsewhere 768), and more. With up to 8 experts,
# and 2 or more of them a token.
TOKENS = {"few": sized((0, 25), (0, 4)), "middle": sized((140, 250), (4, 4)), "many": sized((3100, 3400), (4, 4))}
EVERY_NEED = [Needs(*wants) for wants in product((False, True), repeat=3)]
# Those of most trainings: of a layer in the middle, the lowest, and one without trained experts.
NEEDS = [Needs(True, True, True), Needs(False, False, True), Needs(True, True, False)]


@dataclass(frozen=True)
class Kind:
    """Whatever decides on the kernels that a layer is compiled to."""

    dtype: torch.dtype
    activation: str
    hidden: int
    intermediate: int
    layout: str = ""  # of i(nterleaved), t(ransposed) and b(iased)
    rows: str = "few"
    format: str = PLAIN

    def __str__(self) -> str:
        size = f"{self.hidden}x{self.intermediate}"
        return f"{self.dtype}-{self.activation}-{size}-{self.layout}-{self.rows}-{self.format}".removeprefix("torch.")


KINDS = [
    Kind(BF16, "silu", 256, 128), Kind(BF16, "silu", 33, 72), Kind(BF16, "silu", 256, 128, rows="middle"),
    Kind(BF16, "silu", 256, 128, rows="many"), Kind(BF16, "silu", 2048, 64, "b"),
    Kind(BF16, "gpt-oss", 64, 256, "itb"), Kind(BF16, "gpt-oss", 64, 256, "itb", "middle"),
    Kind(BF16, "gpt-oss", 64, 256, "itb", "many"), Kind(BF16, "gpt-oss", 72, 33, "itb"),
    Kind(BF16, "silu", 128, 64, "t"), Kind(BF16, "silu", 128, 64, "tb", "many"), Kind(BF16, "silu", 64, 256, "i"),
    Kind(BF16, "gelu", 64, 128, "i", "middle"), Kind(BF16, "gelu_tanh", 128, 128, "b"),
    Kind(BF16, "clamped", 128, 64, rows="middle"), Kind(BF16, "relu2", 128, 256, "b", "many"),
    Kind(BF16, "plain", 33, 64, "t"), Kind(BF16, "relu2", 64, 72, "", "middle"),
    Kind(FP16, "silu", 256, 128), Kind(FP16, "gpt-oss", 128, 64, "itb", "middle"), Kind(FP16, "gelu", 72, 33, "b"),
    Kind(FP16, "silu", 64, 128, rows="many"),
    Kind(FP32, "silu", 128, 64), Kind(FP32, "gpt-oss", 64, 128, "itb", "middle"), Kind(FP32, "gelu_tanh", 33, 72, "b"),
    Kind(FP32, "relu2", 64, 64, "t", "many"), Kind(FP32, "clamped", 72, 33, "t"),
]  # fmt: skip
QUANTIZED = [
    Kind(BF16, "silu", 256, 128, rows=rows, format=name)
    for name in ("int8", "nf4", "nf4_double", "fp8", "mxfp4")
    for rows in ("few", "middle")
] + [
    Kind(BF16, "gpt-oss", 64, 256, "itb", format="mxfp4"), Kind(BF16, "silu", 33, 72, format="nf4"),
    Kind(FP32, "silu", 128, 64, format="int8"), Kind(FP16, "gelu", 72, 33, "b", format="fp8"),
]  # fmt: skip
REHEARSED = [Kind(FP32, "gpt-oss", 24, 33, "itb")]
QUANTIZED_REHEARSED = [Kind(BF16, "silu", 9, 8, "", "middle", "nf4")]

drawn = settings(
    max_examples=sized(25, 2), deadline=None, derandomize=True, report_multiple_bugs=False, database=None,
    phases=[Phase.generate],  # the first failure is enough: making it smaller would take the GPU's time
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
routings = st.tuples(st.integers(2, 8), st.integers(0, 2**31), st.sampled_from(["uniform", "few experts"]))


def check(kind: Kind, data: st.DataObject, needs: Needs, recompute: str) -> None:
    experts, seed, routing = data.draw(routings, "experts, seed and routing")
    top_k = data.draw(st.integers(2, min(4, experts)), "top_k")
    tokens = data.draw(st.integers(*TOKENS[kind.rows]), "tokens")
    trained = data.draw(st.permutations(range(experts)), "experts")[: data.draw(st.integers(0, experts), "trained")]
    used = data.draw(st.permutations(range(experts)), "used")
    used = used if routing == "uniform" else used[: data.draw(st.integers(top_k, experts), "how many")]
    elsewhere = data.draw(st.sampled_from([False, False, True]), "elsewhere")
    torch.manual_seed(seed)
    layer = make_layer(
        tokens, top_k, experts, kind.hidden, kind.intermediate, tuple(trained), tuple(used), kind.dtype,
        ACTIVATIONS[kind.activation], "i" in kind.layout, "t" in kind.layout, "b" in kind.layout, elsewhere,
        kind.format,
    )  # fmt: skip
    agrees(layer.on(DEVICE), "triton", needs, recompute)


@pytest.mark.parametrize("kind", sized(KINDS, REHEARSED), ids=str)
@drawn
@given(data=st.data(), needs=st.sampled_from(NEEDS), recompute=st.sampled_from(RECOMPUTE))
def test_layers_agree_with_the_reference_and_have_the_same_bits_twice(kind, data, needs, recompute):
    check(kind, data, needs, recompute)


@pytest.mark.parametrize("needs", sized(EVERY_NEED, EVERY_NEED[2:3]), ids=str)
@drawn
@given(data=st.data(), recompute=st.sampled_from(RECOMPUTE))
def test_whatever_needs_a_gradient_has_it(needs, data, recompute):
    check(Kind(BF16, "silu", *sized((256, 128), (16, 8)), "b"), data, needs, recompute)


@pytest.mark.parametrize("kind", sized(QUANTIZED, QUANTIZED_REHEARSED), ids=str)
@drawn
@given(data=st.data(), needs=st.sampled_from(NEEDS), recompute=st.sampled_from(RECOMPUTE))
def test_quantized_layers_agree_with_their_decoded_weights(kind, data, needs, recompute):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "SCRATCH", 200_000)  # bytes: an expert or two, so that several are decoded in turn
        patch.setattr(parts, "FEW_ROWS", -1 if kind.rows == "middle" else 1000)  # whatever was drawn
        check(kind, data, needs, recompute)

from dataclasses import replace

import pytest
import torch

from esft_kernels.activation import Activation
from esft_kernels.backends import reference
from esft_kernels.pools import ExpertPools, ExpertWeights

pytest.importorskip("triton")
import triton.language as tl

from esft_kernels.triton_ops import up_gemm as op
from esft_kernels.triton_ops.tiles import choose_tiles, chosen_by
from esft_kernels.triton_ops.up_gemm import up_gemm
from tests.esft_kernels.bounds import Watched, check_bounds, poison_masked, sparse
from tests.esft_kernels.layers import (
    ACTIVATIONS,
    TOLERANCE,
    Layer,
    assert_close,
    h_columns,
    make_layer,
    poison_empty,
)


def expected(layer: Layer) -> tuple[torch.Tensor, torch.Tensor]:
    """H, its columns ordered as the kernels order them, and A, in float64."""
    layer = layer.to(torch.float64)
    pools, routing = layer.pools, layer.routing
    _, h = reference.forward(layer.x_TD, layer.weights_TK, pools, routing, routing.num_rows)
    return h[:, h_columns(pools)], pools.activation.forward(*pools.split(h))


def buffers(layer: Layer, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    pools, n = layer.pools, layer.routing.num_rows
    return layer.x_TD.new_empty(rows, pools.gate_up_size), layer.x_TD.new_empty(n, pools.intermediate_size)


LAYOUTS = [
    {}, {"interleaved": True}, {"transposed": True}, {"biased": True},
    {"transposed": True, "trained": ()}, {"transposed": True, "trained": (3, 0, 1, 2)},
]  # fmt: skip
CASES = [(layout, torch.float32) for layout in LAYOUTS]
CASES += [(LAYOUTS[3], dtype) for dtype in (torch.bfloat16, torch.float16)]


@pytest.mark.parametrize(("layout", "dtype"), CASES, ids=str)
def test_layouts_and_dtypes(layout, dtype, monkeypatch):
    sizes = {"tokens": 25, "top_k": 2, "experts": 4, "used": (0, 1, 3), "hidden": 71, "intermediate": 21}
    layer = make_layer(dtype=dtype, **sizes | {"trained": (2, 1)} | layout)  # no rows on the first trained
    poison_empty(monkeypatch)
    poison_masked(monkeypatch)
    check_bounds(monkeypatch)
    h, a = buffers(layer, layer.routing.num_rows)
    routing = layer.routing
    up_gemm(layer.x_TD, routing.token_N, layer.pools, routing.offsets_E1, routing.num_trained, h, a)
    for actual, exact in zip((h, a), expected(layer), strict=True):
        assert_close(actual, exact, TOLERANCE[dtype])


# Blocks are 16 rows, 32 columns and 64 input features here: a block and one more, less than one, and whole ones.
@pytest.mark.parametrize(("hidden", "intermediate"), [(65, 33), (20, 9), (64, 34), (70, 32), (128, 64)])
def test_nothing_outside_the_tensors_is_touched_at_any_size(hidden, intermediate, monkeypatch):
    layer = make_layer(
        tokens=7, experts=3, trained=(1,), hidden=hidden, intermediate=intermediate, dtype=torch.float32, biased=True,
        activation=Activation("relu2", gated=False),
    )  # fmt: skip
    poison_empty(monkeypatch)
    poison_masked(monkeypatch)
    check_bounds(monkeypatch)
    h, a = buffers(layer, layer.routing.num_rows)
    routing = layer.routing
    up_gemm(layer.x_TD, routing.token_N, layer.pools, routing.offsets_E1, routing.num_trained, h, a)
    for actual, exact in zip((h, a), expected(layer), strict=True):
        assert_close(actual, exact, TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_is_made_from_h_as_it_is_stored(dtype):
    layer = make_layer(tokens=7, dtype=dtype)
    h, a = buffers(layer, layer.routing.num_rows)
    routing = layer.routing
    up_gemm(layer.x_TD, routing.token_N, layer.pools, routing.offsets_E1, routing.num_trained, h, a)
    exact = layer.activation.forward(h[:, 0::2].double(), h[:, 1::2].double())
    # A itself is rounded once, to the nearest or towards zero; an H before its own rounding would be off by more.
    kind = torch.finfo(dtype)
    assert ((a.double() - exact).abs() <= 1.001 * kind.eps * exact.abs().clamp(min=kind.tiny)).all()


@pytest.mark.parametrize("trained", [(4, 1), (), (0, 1, 2, 3, 4, 5)])
def test_rows_made_again_get_the_tiles_they_had(trained, monkeypatch):
    layer = make_layer(dtype=torch.float32, tokens=7, hidden=24, intermediate=10, trained=trained)
    pools, routing = layer.pools, layer.routing
    asked = []
    real = op.tiles_for
    monkeypatch.setattr(op, "tiles_for", lambda tensor, *args: asked.append(args) or real(tensor, *args))
    h, a = buffers(layer, routing.num_rows)
    up_gemm(layer.x_TD, routing.token_N, pools, routing.offsets_E1, routing.num_trained, h, a)
    up_gemm(layer.x_TD, routing.token_N, pools, routing.offsets_E1[routing.num_trained :], 0, h, None)
    assert asked == [("up", 7 * 3 // 6, (20, 24), False)] * 2


def test_rows_of_a_single_expert_are_all_its_own(monkeypatch):
    layer = make_layer(dtype=torch.float32, tokens=9, top_k=1, experts=1, trained=(0,))
    asked = []
    real = op.tiles_for
    monkeypatch.setattr(op, "tiles_for", lambda tensor, *args: asked.append(args) or real(tensor, *args))
    h, a = buffers(layer, 9)
    up_gemm(layer.x_TD, layer.routing.token_N, layer.pools, layer.routing.offsets_E1, 1, h, a)
    assert asked == [("up", 9, (80, 72), False)]


def test_no_expert_at_all():
    none = ExpertWeights(torch.empty(0, 8, 6), torch.empty(0, 6, 4))
    h, a = torch.empty(0, 8), torch.empty(0, 4)
    up_gemm(torch.ones(3, 6), torch.empty(0, dtype=torch.int64), ExpertPools(none, none), torch.tensor([0]), 0, h, a)


def test_a_token_past_what_32_bit_offsets_reach(tmp_path, monkeypatch):
    check_bounds(monkeypatch)  # an offset that wraps round would end the process
    layer = make_layer(dtype=torch.float16, tokens=4, hidden=32, intermediate=8)
    far = torch.tensor([2**27 - 1, 3, 2**26, 2**25 + 1])  # times 32 features
    x = sparse(tmp_path / "x", 2**27, 32, dtype=torch.float16)
    x[far] = layer.x_TD
    h, a = buffers(layer, layer.routing.num_rows)
    routing = layer.routing
    up_gemm(x, far[routing.token_N], layer.pools, routing.offsets_E1, routing.num_trained, h, a)
    for actual, exact in zip((h, a), expected(layer), strict=True):
        assert_close(actual, exact, TOLERANCE[torch.float16])


@pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_activations(activation):
    layer = make_layer(tokens=7, dtype=torch.float32, activation=activation)
    h, a = buffers(layer, layer.routing.num_rows)
    routing = layer.routing
    up_gemm(layer.x_TD, routing.token_N, layer.pools, routing.offsets_E1, routing.num_trained, h, a)
    for actual, exact in zip((h, a), expected(layer), strict=True):
        assert_close(actual, exact, TOLERANCE[torch.float32])


@pytest.mark.parametrize("activation", [ACTIVATIONS["silu"], ACTIVATIONS["relu2"]], ids=["gated", "plain"])
def test_columns_finished_in_pieces_and_64_bit_offsets(activation, monkeypatch):
    monkeypatch.setattr(op, "PIECE", tl.constexpr(8))
    monkeypatch.setattr(op, "wide", lambda *tensors: True)
    layer = make_layer(tokens=7, experts=3, trained=(1,), dtype=torch.float32, activation=activation, biased=True)
    check_bounds(monkeypatch)
    poison_empty(monkeypatch)
    h, a = buffers(layer, layer.routing.num_rows)
    routing = layer.routing
    op.up_gemm(layer.x_TD, routing.token_N, layer.pools, routing.offsets_E1, routing.num_trained, h, a)
    for actual, exact in zip((h, a), expected(layer), strict=True):
        assert_close(actual, exact, TOLERANCE[torch.float32])


@pytest.mark.filterwarnings("ignore:overflow")  # numpy's, inside the interpreter: exp overflows to inf, as it should
def test_extreme_gates_do_not_overflow():
    layer = make_layer(dtype=torch.float32, tokens=4)
    layer.x_TD.mul_(1e4)
    h, a = buffers(layer, layer.routing.num_rows)
    routing = layer.routing
    up_gemm(layer.x_TD, routing.token_N, layer.pools, routing.offsets_E1, routing.num_trained, h, a)
    assert a.isfinite().all()
    assert_close(a, expected(layer)[1], TOLERANCE[torch.float32])


def test_h_is_written_for_the_rows_kept_only(monkeypatch):
    layer = make_layer(dtype=torch.float32, tokens=9, intermediate=20)
    routing = layer.routing
    rows = routing.prefix_rows()
    poison_empty(monkeypatch)
    check_bounds(monkeypatch)
    h, a = buffers(layer, rows + 1)
    up_gemm(layer.x_TD, routing.token_N, layer.pools, routing.offsets_E1, routing.num_trained, h[:rows], a)
    exact_h, exact_a = expected(layer)
    assert_close(h[:rows], exact_h[:rows], TOLERANCE[torch.float32])
    assert_close(a, exact_a, TOLERANCE[torch.float32])
    assert h[rows:].isnan().all()


@pytest.mark.parametrize("tokens", [13, 30, 0])
def test_frozen_rows_alone(tokens, monkeypatch):
    layer = make_layer(dtype=torch.float32, tokens=tokens, intermediate=12)
    routing = layer.routing
    poison_empty(monkeypatch)
    h, _ = buffers(layer, routing.num_rows)
    up_gemm(layer.x_TD, routing.token_N, layer.pools, routing.offsets_E1[routing.num_trained :], 0, h, None)
    prefix = routing.prefix_rows()
    assert h[:prefix].isnan().all()
    assert_close(h[prefix:], expected(layer)[0][prefix:], TOLERANCE[torch.float32])


def test_h_may_be_left_out():
    layer = make_layer(dtype=torch.float32, tokens=7, biased=True)
    routing = layer.routing
    _, a = buffers(layer, 0)
    up_gemm(layer.x_TD, routing.token_N, layer.pools, routing.offsets_E1, routing.num_trained, None, a)
    assert_close(a, expected(layer)[1], TOLERANCE[torch.float32])


def test_a_nan_weight_stays_a_nan_through_a_clamp():
    layer = make_layer(tokens=4, dtype=torch.float32, activation=ACTIVATIONS["gpt-oss"])
    layer.gate_up_EGD[:] = float("nan")
    h, a = buffers(layer, layer.routing.num_rows)
    routing = layer.routing
    up_gemm(layer.x_TD, routing.token_N, layer.pools, routing.offsets_E1, routing.num_trained, h, a)
    assert a.isnan().all()


@pytest.mark.parametrize("intermediate", [24, 16, 33])  # 48, 32 and 66 columns; a tile has 32
@pytest.mark.parametrize("hidden", [72, 64])  # a step has 64
def test_masks_are_left_out_only_where_every_tile_is_whole(hidden, intermediate, monkeypatch):
    monkeypatch.setattr(op, "_up_gemm_kernel", kernel := Watched())
    layer = make_layer(tokens=5, hidden=hidden, intermediate=intermediate, dtype=torch.float32)
    h, a = buffers(layer, layer.routing.num_rows)
    up_gemm(layer.x_TD, layer.routing.token_N, layer.pools, layer.routing.offsets_E1, 2, h, a)
    assert kernel.constants["EVEN_N"] == (intermediate == 16) and kernel.constants["EVEN_K"] == (hidden == 64)
    assert isinstance(op.PIECE, tl.constexpr)  # the compiler takes no other global


@pytest.mark.parametrize(("transposed", "layout"), [(False, "out_in"), (True, "in_out")])
@pytest.mark.parametrize("changes", [{"descriptors": True}, {"persistent": 1}], ids=str)
def test_variants_are_the_kernels_constants(changes, transposed, layout, monkeypatch):
    monkeypatch.setattr(op, "_up_gemm_kernel", kernel := Watched())
    layer = make_layer(interleaved=True, transposed=transposed, dtype=torch.float32)
    with chosen_by(lambda *asked: replace(choose_tiles(*asked), **changes)):
        h, a = buffers(layer, layer.routing.num_rows)
        up_gemm(layer.x_TD, layer.routing.token_N, layer.pools, layer.routing.offsets_E1, 2, h, a)
    assert kernel.constants["LAYOUT"] == (layout if "descriptors" in changes else None)
    assert kernel.constants["PERSISTENT"] == ("persistent" in changes) == (kernel.grid == (3,))

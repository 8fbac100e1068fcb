from dataclasses import replace

import pytest
import torch

from esft_kernels.activation import Activation
from esft_kernels.backend import Needs
from esft_kernels.backends import reference

pytest.importorskip("triton")
import triton.language as tl

from esft_kernels.triton_ops import grad_gemm as op
from esft_kernels.triton_ops.grad_gemm import grad_gemm
from esft_kernels.triton_ops.tiles import choose_tiles, chosen_by
from tests.esft_kernels.bounds import Watched, check_bounds, poison_masked, sparse
from tests.esft_kernels.layers import ACTIVATIONS, TOLERANCE, Layer, assert_close, h_columns, make_layer, poison_empty

NEEDS = [Needs(*map(bool, bits)) for bits in ((1, 1, 1), (1, 0, 0), (0, 1, 1), (0, 1, 0), (0, 0, 1))]


def exact_parts(layer: Layer) -> tuple[torch.Tensor, ...]:
    """H and its gradient with columns as the kernels order them, weighted A, and row sums, in float64."""
    layer = layer.to(torch.float64)
    pools, routing = layer.pools, layer.routing
    _, h = reference.forward(layer.x_TD, layer.weights_TK, pools, routing, routing.num_rows)
    gate, up = pools.split(h)
    a = pools.activation.forward(gate, up)
    weight = reference.row_weights(layer.weights_TK, routing, torch.float64)
    grad_a = reference.grouped_gemm(
        layer.grad_out_TD[routing.token_N], lambda e: pools.at(e).down_EDF.T, routing.offsets_E1.tolist(), a.shape[1]
    )
    grad_h = torch.empty_like(h)
    for part, grad in zip(pools.split(grad_h), pools.activation.backward(grad_a * weight, gate, up), strict=True):
        if part is not None:
            part.copy_(grad)
    columns = h_columns(pools)
    return h[:, columns], grad_h[:, columns], a * weight, (grad_a * a).sum(-1)


def check(layer: Layer, needs: Needs, monkeypatch) -> None:
    routing, dtype = layer.routing, layer.x_TD.dtype
    prefix, here, tolerance = routing.prefix_rows(), int(routing.offsets_E1[-1]), TOLERANCE[dtype]
    h, exact_grad_h, exact_weighted, exact_sums = exact_parts(layer)
    if not needs.all_rows:
        h = h[:prefix]
    poison_empty(monkeypatch)
    poison_masked(monkeypatch)
    check_bounds(monkeypatch)  # a row past an expert's end is another tile's, and would be stored twice
    pools, h = layer.pools, h.to(dtype).contiguous()
    grad_h, weighted_a, sums = grad_gemm(layer.grad_out_TD, h, layer.weights_TK, pools, routing, needs)
    if needs.x or needs.trained:
        written = here if needs.x else prefix
        assert grad_h is not None and grad_h.dtype == dtype and grad_h[written:].isnan().all()
        assert_close(grad_h[:written], exact_grad_h[:written], tolerance)
    else:
        assert grad_h is None
    if needs.trained:
        assert weighted_a is not None and weighted_a.dtype == dtype and weighted_a[prefix:].isnan().all()
        assert_close(weighted_a[:prefix], exact_weighted[:prefix], tolerance)
    else:
        assert weighted_a is None
    assert (sums is not None) == needs.weights
    if sums is not None:
        assert sums.dtype == torch.float32 and sums.shape == (len(h), -(-pools.intermediate_size // 32))
        assert_close(sums[:here].sum(dim=1), exact_sums[:here], tolerance)


@pytest.mark.parametrize("needs", NEEDS, ids=str)
def test_only_what_is_needed(needs, monkeypatch):
    # Two tiles of F, and on some experts two tiles of rows.
    check(make_layer(experts=4, trained=(2, 1), intermediate=41, dtype=torch.float32), needs, monkeypatch)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit(dtype, monkeypatch):
    check(make_layer(experts=4, trained=(2, 1), intermediate=41, dtype=dtype), NEEDS[0], monkeypatch)


@pytest.mark.parametrize("activation", ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_activations(activation, monkeypatch):
    check(make_layer(tokens=7, dtype=torch.float32, activation=activation), NEEDS[0], monkeypatch)


@pytest.mark.parametrize("activation", [ACTIVATIONS["silu"], ACTIVATIONS["relu2"]], ids=["gated", "plain"])
def test_columns_finished_in_pieces_and_64_bit_offsets(activation, monkeypatch):
    monkeypatch.setattr(op, "PIECE", tl.constexpr(8))
    monkeypatch.setattr(op, "wide", lambda *tensors: True)
    check(
        make_layer(tokens=7, experts=3, dtype=torch.float32, trained=(1,), activation=activation), NEEDS[0], monkeypatch
    )


LAYOUTS = [
    {"interleaved": True}, {"transposed": True}, {"trained": ()}, {"transposed": True, "trained": ()},
    {"transposed": True, "trained": (5, 0, 3, 1, 2, 4)}, {"used": (0, 1, 2, 5)}, {"elsewhere": True}, {"tokens": 0},
]  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_layouts_and_routings(layout, monkeypatch):
    check(make_layer(dtype=torch.float32, **{"tokens": 7, "intermediate": 20} | layout), NEEDS[0], monkeypatch)


@pytest.mark.parametrize("layout", [{"trained": ()}, {"elsewhere": True}, {"used": (0, 2, 3, 5)}], ids=str)
def test_the_prefix_alone(layout, monkeypatch):
    check(make_layer(dtype=torch.float32, **{"tokens": 7, "intermediate": 20} | layout), NEEDS[-1], monkeypatch)


# Blocks are 16 rows, 32 columns and 64 input features here: a block and one more, less than one, and whole ones.
@pytest.mark.parametrize(("hidden", "intermediate"), [(65, 33), (20, 9), (64, 34), (70, 32), (128, 64)])
def test_nothing_outside_the_tensors_is_touched_at_any_size(hidden, intermediate, monkeypatch):
    plain = Activation("relu2", gated=False)
    sizes = {"tokens": 7, "experts": 3, "trained": (1,), "hidden": hidden, "intermediate": intermediate}
    check(make_layer(dtype=torch.float32, activation=plain, **sizes), NEEDS[0], monkeypatch)


@pytest.mark.parametrize("needs", [NEEDS[0], NEEDS[4]], ids=["all rows", "prefix"])
def test_tiles_are_for_the_rows_of_the_experts_that_take_part(needs, monkeypatch):
    layer, asked = make_layer(dtype=torch.float32, tokens=9, hidden=24, intermediate=10, trained=(4,)), []
    h = torch.zeros(layer.routing.num_rows if needs.all_rows else layer.routing.prefix_rows(), 20)
    real = op.tiles_for
    monkeypatch.setattr(op, "tiles_for", lambda tensor, *args: asked.append(args) or real(tensor, *args))
    grad_gemm(layer.grad_out_TD, h, layer.weights_TK, layer.pools, layer.routing, needs)
    assert asked == [("grad", len(h) // 6 if needs.all_rows else len(h), (10, 24), False)]


def test_a_token_past_what_32_bit_offsets_reach(tmp_path, monkeypatch):
    check_bounds(monkeypatch)  # an offset that wraps round would end the process
    layer = make_layer(dtype=torch.float16, tokens=4, hidden=32, intermediate=8)
    far = torch.tensor([2**27 - 1, 3, 2**26, 2**25 + 1])  # times 32 features
    grad_out = sparse(tmp_path / "grad", 2**27, 32, dtype=torch.float16)
    grad_out[far] = layer.grad_out_TD
    h, exact_grad_h, _, _ = exact_parts(layer)
    routing = replace(layer.routing, token_N=far[layer.routing.token_N])
    found, _, _ = grad_gemm(grad_out, h.half().contiguous(), layer.weights_TK, layer.pools, routing, NEEDS[1])
    assert_close(found, exact_grad_h, TOLERANCE[torch.float16])


def test_row_sums_past_what_32_bit_offsets_reach(tmp_path, monkeypatch):
    """The third tile's sums begin at 2 * 2**30, and that is where they are stored."""
    check_bounds(monkeypatch)
    layer = make_layer(tokens=3, intermediate=70, dtype=torch.float16, activation=Activation("relu2", gated=False))
    routing, rows = layer.routing, 2**30
    h, _, _, exact_sums = exact_parts(layer)
    huge_h = sparse(tmp_path / "h", rows, 70, dtype=torch.float16)
    huge_h[: len(h)] = h
    huge_sums = sparse(tmp_path / "sums", 3, rows, dtype=torch.float32)
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(
        torch.Tensor,
        "new_empty",
        lambda self, *size, **kwargs: huge_sums if size == (3, rows) else new_empty(self, *size, **kwargs),
    )
    schedule = op.max_row_tiles  # of the rows that there are: an empty tile for each of the others would take forever
    monkeypatch.setattr(op, "max_row_tiles", lambda num_rows, *sizes: schedule(len(h), *sizes))
    _, _, sums = grad_gemm(layer.grad_out_TD, huge_h, layer.weights_TK, layer.pools, routing, NEEDS[3])
    assert sums is not None and sums.shape == (rows, 3)
    assert_close(sums[: len(h)].sum(dim=1), exact_sums, TOLERANCE[torch.float16])


@pytest.mark.parametrize("intermediate", [24, 32, 33])  # a tile has 32
@pytest.mark.parametrize("hidden", [65, 64])  # a step has 64
def test_masks_are_left_out_only_where_every_tile_is_whole(hidden, intermediate, monkeypatch):
    monkeypatch.setattr(op, "_grad_gemm_kernel", kernel := Watched())
    layer = make_layer(tokens=5, hidden=hidden, intermediate=intermediate, dtype=torch.float32)
    h = torch.empty(layer.routing.num_rows, layer.pools.gate_up_size)
    grad_gemm(layer.grad_out_TD, h, layer.weights_TK, layer.pools, layer.routing, NEEDS[0])
    assert kernel.constants["EVEN_N"] == (intermediate == 32) and kernel.constants["EVEN_K"] == (hidden == 64)
    assert isinstance(op.PIECE, tl.constexpr)  # the compiler takes no other global


@pytest.mark.parametrize("activation", [ACTIVATIONS["silu"], ACTIVATIONS["relu2"]], ids=["gated", "plain"])
@pytest.mark.parametrize("needs", [NEEDS[0], NEEDS[-1]], ids=["all rows", "prefix"])
def test_h_that_is_loaded_ahead_gives_the_same_bits(activation, needs, monkeypatch):
    monkeypatch.setattr(op, "PIECE", tl.constexpr(8))
    layer = make_layer(tokens=9, experts=3, intermediate=41, dtype=torch.bfloat16, trained=(1,), activation=activation)
    h, found = torch.randn(layer.routing.num_rows, layer.pools.gate_up_size).bfloat16(), []
    for ahead in (False, True):
        with chosen_by(lambda *asked, ahead=ahead: replace(choose_tiles(*asked), ahead=ahead)):
            results = grad_gemm(layer.grad_out_TD, h, layer.weights_TK, layer.pools, layer.routing, needs)
            found.append([None if each is None else each.nan_to_num(7) for each in results])
    prefix, every = (int(layer.routing.offsets_E1[index]) for index in (layer.routing.num_trained, -1))
    ends = (every, prefix, every) if needs.all_rows else (prefix,) * 3
    for later, ahead, end in zip(*found, ends, strict=True):
        assert (later is None) == (ahead is None)
        assert later is None or ahead is None or (torch.equal(later[:end], ahead[:end]) and later[:end].any())


@pytest.mark.parametrize(("transposed", "layout"), [(False, "in_out"), (True, "out_in")])
@pytest.mark.parametrize("changes", [{"descriptors": True}, {"persistent": 1}, {"ahead": True}], ids=str)
def test_variants_are_the_kernels_constants(changes, transposed, layout, monkeypatch):
    monkeypatch.setattr(op, "_grad_gemm_kernel", kernel := Watched())
    layer = make_layer(interleaved=True, transposed=transposed, dtype=torch.float32)
    with chosen_by(lambda *asked: replace(choose_tiles(*asked), **changes)):
        h = torch.empty(layer.routing.num_rows, layer.pools.gate_up_size)
        grad_gemm(layer.grad_out_TD, h, layer.weights_TK, layer.pools, layer.routing, NEEDS[0])
    assert kernel.constants["LAYOUT"] == (layout if "descriptors" in changes else None)
    assert kernel.constants["PERSISTENT"] == ("persistent" in changes) == (kernel.grid == (3,))
    assert kernel.constants["AHEAD"] == ("ahead" in changes)

from dataclasses import replace

import pytest
import torch

from esft_kernels.backend import Needs
from esft_kernels.backends import cpu, reference
from esft_kernels.backends.cpu import Group, Products, rounded
from esft_kernels.formats.resolve import FORMATS
from tests.esft_kernels.layers import ACTIVATIONS, GPT_OSS, TOLERANCE, Layer, assert_close, make_layer, poison_empty

EVERYTHING = Needs(True, True, True)
pytestmark = pytest.mark.filterwarnings("error")  # PyTorch warns where it makes room for results that do not fit
# Odd counts above 32 are rounded up. The first trained expert has most rows, so that the next meets what it left.
COUNTS = {4: 39, 1: 33, 0: 35, 2: 5, 3: 41, 5: 37}


def uneven(counts: dict[int, int] = COUNTS, **settings) -> Layer:
    """A layer whose experts have so many rows each, one a token."""
    ids = torch.tensor([e for e, count in counts.items() for _ in range(count)], dtype=torch.int64)
    layer = make_layer(**{"tokens": len(ids), "top_k": 1, "hidden": 12, "intermediate": 7} | settings)
    return replace(layer, ids_TK=ids[torch.randperm(len(ids))][:, None])


def exact(layer: Layer, needs: Needs = EVERYTHING):
    """Output, H and gradients of the reference, in float64."""
    layer = layer.to(torch.float64)
    pools, routing = layer.pools, layer.routing
    out, h = reference.forward(layer.x_TD, layer.weights_TK, pools, routing, routing.num_rows)
    return out, h, reference.backward(layer.grad_out_TD, layer.x_TD, h, layer.weights_TK, pools, routing, needs)


def check(layer: Layer, needs: Needs = EVERYTHING) -> None:
    """All three functions, with memory poisoned."""
    pools, routing, tolerance = layer.pools, layer.routing, TOLERANCE[layer.x_TD.dtype]
    out, h_NG, expected = exact(layer, needs)
    here, prefix, mine = int(routing.offsets_E1[-1]), routing.prefix_rows(), h_NG.to(layer.x_TD.dtype)
    given = [layer.x_TD, layer.weights_TK, layer.grad_out_TD, *pools.trained.tensors(), *pools.frozen.tensors()]
    before = [None if t is None else t.clone() for t in given]
    with pytest.MonkeyPatch.context() as patch:
        poison_empty(patch)
        for keep in (0, prefix, routing.num_rows):
            actual, kept = cpu.forward(layer.x_TD, layer.weights_TK, pools, routing, keep)
            assert_close(actual, out, tolerance)
            assert kept.shape == (keep, pools.gate_up_size)
            assert_close(kept[:here], h_NG[: min(keep, here)], tolerance)
        rebuilt = cpu.rebuild(layer.x_TD, mine[:prefix], pools, routing)
        assert rebuilt.shape == h_NG.shape
        assert_close(rebuilt[:here], h_NG[:here], tolerance)
        mine = mine if needs.all_rows else mine[:prefix]
        found = cpu.backward(layer.grad_out_TD, layer.x_TD, mine, layer.weights_TK, pools, routing, needs)
    assert_close(found.x_TD, expected.x_TD, tolerance)
    assert_close(found.weights_TK, expected.weights_TK, tolerance)
    assert (found.trained is None) == (expected.trained is None)
    if found.trained is not None and expected.trained is not None:
        for a, b in zip(found.trained.tensors(), expected.trained.tensors(), strict=True):
            assert_close(a, b, tolerance)
    assert all(
        a is None or torch.equal(a, b) for a, b in zip(given, before, strict=True)
    )  # nothing given is written to


def test_row_counts_are_rounded_up_to_sixteen_sizes_per_power_of_two():
    assert [rounded(n) for n in (0, 1, 31, 32, 33, 34, 64, 65, 68, 1000, 1024, 1025)] == [
        0, 1, 31, 32, 34, 34, 64, 68, 68, 1024, 1024, 1088,
    ]  # fmt: skip
    for power in range(5, 12):
        sizes = [rounded(n) for n in range(2**power, 2 ** (power + 1))]
        assert len({size for size in sizes if size < 2 ** (power + 1)}) == 16
        assert all(n <= size <= n + n / 16 for n, size in enumerate(sizes, start=2**power))


def test_groups_cover_the_rows_in_order_and_hold_no_more_than_they_may():
    offsets = [0, 3, 3, 5, 6, 20, 21, 22, 22]
    groups = cpu._groups(offsets, 0, 8, most_rows=6)
    assert [group.spans for group in groups] == [
        [(0, 0, 3), (2, 3, 5), (3, 5, 6)],  # position 1 has no rows
        [(4, 6, 20)],  # more than may be together, alone
        [(5, 20, 21), (6, 21, 22)],
    ]
    assert [group.size for group in cpu._groups(offsets, 0, 8, most_rows=0)] == [3, 2, 1, 14, 1, 1]
    assert cpu._groups(offsets, 7, 8, most_rows=6) == []
    assert [group.rows for group in cpu._groups(offsets, 2, 5, most_rows=5)] == [slice(3, 6), slice(6, 20)]


def test_buffers_hold_the_surplus_rows_of_every_expert():
    group = Group([(2, 10, 43), (3, 43, 78)])  # 33 and 35 rows, which become 34 and 36
    assert group.rows == slice(10, 78) and group.size == 68
    assert group.rounded_size == 33 + 36
    assert Group([(2, 10, 43)]).rounded_size == 34
    assert Group([(0, 0, 2), (1, 2, 1003), (2, 1003, 1004)]).rounded_size == 2 + 1024
    assert cpu._rows_needed([Group([(0, 0, 33)]), Group([(1, 33, 34)])], 40) == (34, 40)
    assert cpu._rows_needed([Group([(0, 0, 1)]), Group([(1, 1, 34)])], 34) == (34, 35)
    assert cpu._rows_needed([], 9) == (0, 9)


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
@pytest.mark.parametrize(("activation", "columns"), [("silu", 80), ("relu2", 40)])
def test_as_many_rows_as_the_cache_holds(activation, columns, dtype, size):
    pools = make_layer(tokens=1, hidden=72, intermediate=40, activation=ACTIVATIONS[activation]).pools
    assert cpu._most_rows(pools, dtype) == 2 * 1024 * 1024 // ((72 + columns + 40) * size)  # rows of X, H and A


@pytest.mark.parametrize("rows", [0, 15, 60, 1000])
@pytest.mark.parametrize("biased", [False, True])
def test_any_grouping_computes_the_layer(rows, biased, monkeypatch):
    monkeypatch.setattr(cpu, "_most_rows", lambda pools, dtype: rows)
    check(make_layer(tokens=64, experts=9, trained=(4, 1, 8), biased=biased))


@pytest.mark.parametrize("rows", [0, 80, 1000])
@pytest.mark.parametrize("biased", [False, True])
def test_surplus_rows_add_nothing(rows, biased, monkeypatch):
    monkeypatch.setattr(cpu, "_most_rows", lambda pools, dtype: rows)
    check(uneven(biased=biased))


LAYOUTS = [
    {"trained": ()}, {"trained": (5, 4, 3, 2, 1, 0)}, {"trained": (4,)}, {"transposed": True}, {"interleaved": True},
    {"activation": GPT_OSS, "biased": True, "interleaved": True}, {"activation": ACTIVATIONS["relu2"]},
]  # fmt: skip


@pytest.mark.parametrize("settings", LAYOUTS, ids=str)
def test_layouts(settings):
    check(uneven(**settings))


@pytest.mark.parametrize(
    "counts", [{}, {4: 33}, {1: 33}, {0: 33}, {4: 33, 1: 1, 6: 20}, {1: 5, 5: 33, 6: 9}, {6: 9}], ids=str
)
@pytest.mark.parametrize("biased", [False, True])
def test_experts_without_rows_and_rows_without_an_expert(counts, biased):
    check(uneven(counts, biased=biased))  # there are six experts: the seventh is not here


@pytest.mark.parametrize("needs", [Needs(*map(bool, (n & 1, n & 2, n & 4))) for n in range(1, 7)], ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_only_the_gradients_asked_for(biased, needs):
    check(uneven(biased=biased), needs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    check(uneven(dtype=dtype, biased=True))
    layer = uneven(dtype=dtype)
    _, h, _ = exact(layer)
    found = cpu.backward(
        layer.grad_out_TD, layer.x_TD, h.to(dtype), layer.weights_TK, layer.pools, layer.routing, EVERYTHING
    )  # fmt: skip
    assert found.x_TD is not None and found.x_TD.dtype == dtype
    # Routing weights are float32, and the sums that are their gradients too: 16 bits would not hold them.
    assert found.weights_TK is not None and found.weights_TK.dtype == torch.float32
    if dtype != torch.float32:
        assert (found.weights_TK != found.weights_TK.to(dtype).float()).any()


class Recorded(Products):
    """The products, each of them noted: factor, position, and rows that go in and come out."""

    calls: list[tuple[str, int, int, int]] = []

    def __call__(self, factor, position, rows, out):
        self.calls.append((factor, position, len(rows), len(out)))
        super().__call__(factor, position, rows, out)


def test_every_product_is_taken_once_with_a_rounded_row_count(monkeypatch):
    layer = uneven({4: 39, 0: 33, 3: 5})
    pools, routing = layer.pools, layer.routing  # positions: 4 and 1 trained; 0, 2, 3 and 5 frozen
    shapes = [(0, 40, 40), (2, 34, 34), (4, 5, 5)]

    def recorded(function, *args) -> list:
        monkeypatch.setattr(Recorded, "calls", [])
        function(*args, products=Recorded)
        return sorted(Recorded.calls)

    _, h, _ = exact(layer)
    x, weights = layer.x_TD, layer.weights_TK
    up, down = [("up", *shape) for shape in shapes], [("down", *shape) for shape in shapes]
    assert recorded(cpu.forward, x, weights, pools, routing, 0) == down + up
    assert recorded(cpu.rebuild, x, h[:39], pools, routing) == up[1:]
    grad_a, grad_x = [("grad_a", *shape) for shape in shapes], [("grad_x", *shape) for shape in shapes]
    for needs, expected in [
        (EVERYTHING, grad_a + grad_x),
        (Needs(False, True, True), grad_a),
        (Needs(False, False, True), grad_a[:1]),
    ]:
        assert recorded(cpu.backward, layer.grad_out_TD, x, h, weights, pools, routing, needs) == expected


@pytest.mark.parametrize(
    ("factor", "which"), [("up", "gate_up"), ("down", "down"), ("grad_a", "down"), ("grad_x", "gate_up")]
)
def test_a_product_is_with_the_expert_at_its_position(factor, which):
    layer = make_layer(tokens=1, hidden=6, intermediate=3, trained=(4, 1))
    product, order = Products(layer.pools), [4, 1, 0, 2, 3, 5]
    weights = layer.gate_up_EGD if which == "gate_up" else layer.down_EDF
    for position, expert in enumerate(order):
        weight = weights[expert].T if factor in ("up", "down") else weights[expert]
        rows = torch.randn(4, weight.shape[0], dtype=torch.float64)
        out = torch.empty(4, weight.shape[1], dtype=torch.float64)
        product(factor, position, rows, out)
        assert_close(out, rows @ weight, TOLERANCE[torch.float64])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_token(dtype):
    layer = make_layer(tokens=0, biased=True, dtype=dtype)
    check(layer)
    out, _ = cpu.forward(layer.x_TD, layer.weights_TK, layer.pools, layer.routing, 0)
    assert out.shape == (0, 72) and out.dtype == dtype


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("rows", [0, 80, 1000])
def test_quantized_weights_in_any_grouping(format, rows, monkeypatch):
    monkeypatch.setattr(cpu, "_most_rows", lambda pools, dtype: rows)
    check(uneven(format=format, biased=True))


def test_quantized_weights_are_decoded_one_matrix_at_a_time_into_one_buffer(monkeypatch):
    layer = uneven({4: 39, 0: 33, 3: 5}, format="int8")
    pools, routing, kind = layer.pools, layer.routing, FORMATS["int8"]
    real, decoded = kind.decode, []
    monkeypatch.setattr(kind, "decode", lambda *args: decoded.append(args[-1].data_ptr()) or real(*args))
    cpu.forward(layer.x_TD, layer.weights_TK, pools, routing, 0)
    assert len(decoded) == 4 and len(set(decoded)) == 1  # both matrices of the frozen experts that have rows

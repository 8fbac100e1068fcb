import pytest
import torch

from esft_kernels.backends import reference

pytest.importorskip("triton")
from esft_kernels.triton_ops import bias as op
from esft_kernels.triton_ops.bias import bias_dot, bias_grad
from tests.esft_kernels.bounds import check_bounds, poison_masked, sparse
from tests.esft_kernels.layers import TOLERANCE, Layer, assert_close, make_layer, poison_empty

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _strict(monkeypatch):
    poison_empty(monkeypatch)
    poison_masked(monkeypatch)
    check_bounds(monkeypatch)


@pytest.mark.parametrize("gather", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bias_grad(dtype, gather):
    layer = make_layer(tokens=45, used=(0, 1, 2, 3, 5), dtype=dtype)  # no row on expert 4, the first trained
    routing = layer.routing
    s, prefix = routing.num_trained, routing.prefix_rows()
    grad = torch.randn(45 if gather else routing.num_rows, 131).to(dtype)
    if not gather:
        grad[prefix:] = float("nan")
    extra = (routing.token_N, layer.weights_TK, routing.slot_N) if gather else ()
    out = bias_grad(grad, routing.offsets_E1[: s + 1], *extra)
    rows = grad.double()
    if gather:
        rows = rows[routing.token_N] * reference.row_weights(layer.weights_TK, routing, torch.float64)
    assert out.dtype == dtype and not out[0].any()
    assert_close(out, reference.bias_grad(rows, routing.offsets_E1.tolist(), s), TOLERANCE[dtype])


def test_bias_grad_puts_paired_columns_to_all_gates_first():
    grad = torch.arange(6.0).repeat(3, 1)
    out = bias_grad(grad, torch.tensor([0, 3]), paired=True)
    assert out.tolist() == [[0, 6, 12, 3, 9, 15]]


@pytest.mark.parametrize("columns", [20, 128, 130])  # one block of columns has 128
@pytest.mark.parametrize("counts", [[31, 32], [33, 0], [0, 65]])  # one block of rows has 32
@pytest.mark.parametrize("paired", [False, True])
def test_sizes(counts, columns, paired):
    offsets = torch.tensor([0, *counts]).cumsum(0)
    grad = torch.randn(sum(counts), columns)  # all gates first
    given = grad.view(-1, 2, columns // 2).transpose(1, 2).reshape(grad.shape) if paired else grad
    out = bias_grad(given, offsets, paired=paired)
    assert_close(out, reference.bias_grad(grad.double(), offsets.tolist(), 2), TOLERANCE[torch.float32])


def test_indices_slots_and_weights_of_rows_past_the_prefix_are_not_read():
    grad, index, slot = torch.randn(4, 20), torch.tensor([3, 1, 0, -(2**40)]), torch.tensor([2, 0, 1, -(2**40)])
    weights = torch.tensor([[0.5, 2.0, 4.0]])
    out = bias_grad(grad, torch.tensor([0, 3]), index, weights, slot)
    assert_close(out, (4 * grad[3] + 0.5 * grad[1] + 2 * grad[0])[None], TOLERANCE[torch.float32])
    assert_close(bias_grad(grad, torch.tensor([0, 3]), index), grad[[3, 1, 0]].sum(0)[None], TOLERANCE[torch.float32])


def test_no_trained_expert():
    assert bias_grad(torch.randn(5, 8), torch.tensor([0])).shape == (0, 8)


class FirstColumns:
    """A kernel that is launched for its first block of columns alone."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return self.kernel[(grid[0], 1)]


def test_a_gradient_past_what_32_bit_offsets_reach(tmp_path, monkeypatch):
    """The third expert's begins at 2 * 2**30."""
    grad = sparse(tmp_path / "rows", 2, 2**30, dtype=torch.float16)
    grad[:, :128] = torch.randn(2, 128)
    huge = sparse(tmp_path / "gradient", 3, 2**30, dtype=torch.float16)
    monkeypatch.setattr(torch, "empty", lambda *sizes, **kwargs: huge)
    monkeypatch.setattr(op, "_bias_grad_kernel", FirstColumns(op._bias_grad_kernel))
    out = bias_grad(grad, torch.tensor([0, 1, 1, 3]), torch.tensor([1, 0, 1]))
    first = grad[:, :128].double()
    expected = torch.stack([first[1], torch.zeros(128).double(), first[0] + first[1]])
    assert_close(out[:, :128], expected, TOLERANCE[torch.float16])


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_in_16_bits_are_added_up_before_they_are_rounded(dtype, weighted):
    """In bf16 as in fp16 the sum of the first two would be 2048, and all of it 0."""
    grad = torch.tensor([[2048.0], [1.0], [-2048.0]], dtype=dtype).expand(3, 4).contiguous()
    places, weights = torch.arange(3), torch.ones(3, 1)
    extra = (places, weights, places) if weighted else ()
    assert bias_grad(grad, torch.tensor([0, 3]), *extra).tolist() == [[1.0] * 4]


def check_dot(layer: Layer) -> None:
    pools, routing = layer.pools, layer.routing
    out = bias_dot(layer.grad_out_TD, pools, routing)
    assert out.shape == (routing.num_rows,) and out.dtype == torch.float32
    exact = layer.to(torch.float64)
    offsets = routing.offsets_E1.tolist()
    for e in range(routing.num_experts):
        start, end = offsets[e : e + 2]
        rows = exact.grad_out_TD[routing.token_N[start:end]]
        assert_close(out[start:end], rows @ exact.pools.at(e).down_bias_ED, TOLERANCE[torch.float32])
    assert out[offsets[-1] :].isnan().all()  # rows of no expert


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bias_dot(dtype):
    check_dot(make_layer(tokens=45, hidden=131, used=(1, 2, 3, 5), biased=True, dtype=dtype))


@pytest.mark.parametrize("hidden", [20, 128, 129])  # one block of columns has 128
@pytest.mark.parametrize("trained", [(), (0,), (0, 1)])
def test_bias_dot_of_sizes_and_pools(hidden, trained):
    layer = make_layer(
        tokens=9, top_k=1, experts=2, hidden=hidden, trained=trained, biased=True, dtype=torch.float32
    )  # fmt: skip
    check_dot(layer)


@pytest.mark.parametrize("tokens", [0, 31, 32, 33, 64])  # one tile has 32 rows
def test_bias_dot_with_all_rows_on_one_expert(tokens):
    layer = make_layer(tokens=tokens, top_k=1, hidden=20, used=(4,), biased=True, dtype=torch.float32)
    check_dot(layer)


def test_bias_dot_leaves_rows_of_no_expert_alone():
    layer = make_layer(tokens=9, hidden=20, biased=True, elsewhere=True, dtype=torch.float32)
    assert int(layer.routing.offsets_E1[-1]) < layer.routing.num_rows
    check_dot(layer)

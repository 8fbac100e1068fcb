from dataclasses import replace

import pytest
import torch

from esft_kernels.backends import reference

pytest.importorskip("triton")
from esft_kernels.triton_ops import grouped_wgrad as op
from esft_kernels.triton_ops.grouped_wgrad import grouped_wgrad
from esft_kernels.triton_ops.tiles import choose_tiles, chosen_by
from tests.esft_kernels.bounds import Watched, check_bounds, poison_masked, sparse
from tests.esft_kernels.layers import TOLERANCE, assert_close, poison_empty


@pytest.fixture(autouse=True)
def _strict(monkeypatch):
    poison_empty(monkeypatch)
    poison_masked(monkeypatch)
    check_bounds(monkeypatch)


@pytest.mark.parametrize(("splits", "wide"), [(1, False), (3, True)])
@pytest.mark.parametrize(
    ("gather", "dtype"),
    [
        ("neither", torch.float32), ("grad", torch.float32), ("rows", torch.float32),
        ("grad", torch.bfloat16), ("rows", torch.bfloat16), ("neither", torch.float16),
    ],
)  # fmt: skip
def test_matches_reference(dtype, gather, splits, wide, monkeypatch):
    monkeypatch.setattr(op, "wide", lambda *tensors: wide)
    monkeypatch.setattr(op, "splits_for", lambda tensor, programs: splits)
    offsets = torch.tensor([0, 16, 16, 17, 52])  # exactly one step of the row loop, none, part of one, three
    n, tokens, out_features, in_features = 52, 11, 37, 71
    grad = torch.randn(tokens + 1 if gather == "grad" else n + 9, out_features).to(dtype)
    rows = torch.randn(tokens + 1 if gather == "rows" else n + 9, in_features).to(dtype)
    for operand, gathered in ((grad, gather == "grad"), (rows, gather == "rows")):
        operand[tokens if gathered else n :] = float("nan")  # what rows past the prefix hold is never read
    index = torch.randint(0, tokens, (n + 9,))
    index[n:] = tokens
    out = grouped_wgrad(
        grad, rows, torch.zeros(4, out_features, in_features, dtype=dtype), offsets,
        grad_index_N=index if gather == "grad" else None, rows_index_N=index if gather == "rows" else None,
    )  # fmt: skip
    assert out.dtype == dtype and not out[1].any()
    grad_rows = grad[index] if gather == "grad" else grad
    in_rows = rows[index] if gather == "rows" else rows
    expected = reference.grouped_wgrad(grad_rows[:n].double(), in_rows[:n].double(), offsets.tolist(), 4)
    assert_close(out, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pieces_of_a_16_bit_gradient_are_added_up_before_they_are_rounded(dtype, monkeypatch):
    """In bf16 as in fp16 a piece of 2049 would become 2048, and the sum 0."""
    monkeypatch.setattr(op, "splits_for", lambda tensor, programs: 2)
    rows = torch.ones(32, 3, dtype=dtype)
    grad = torch.zeros(32, 2, dtype=dtype)
    grad[0], grad[1], grad[16] = 2048, 1, -2048  # the blocks of rows are 16
    out = grouped_wgrad(grad, rows, torch.zeros(1, 2, 3, dtype=dtype), torch.tensor([0, 32]))
    assert torch.equal(out, torch.ones(1, 2, 3, dtype=dtype))


@pytest.mark.parametrize("splits", [1, 2])
def test_the_gradient_is_laid_out_like_the_weights(splits, monkeypatch):
    monkeypatch.setattr(op, "splits_for", lambda tensor, programs: splits)
    offsets = torch.tensor([0, 9, 40])
    grad, rows = torch.randn(40, 24), torch.randn(40, 33)
    like = torch.zeros(2, 33, 24).mT
    out = grouped_wgrad(grad, rows, like, offsets)
    assert out.stride() == like.stride()
    assert not like.any() and out.data_ptr() != like.data_ptr()  # of which only the layout is taken
    assert_close(out, reference.grouped_wgrad(grad.double(), rows.double(), offsets.tolist(), 2), 1e-5)


@pytest.mark.parametrize("features", [16, 37])
def test_paired_columns_go_to_weights_with_all_gates_first(features):
    offsets = torch.tensor([0, 9, 40])
    grad, rows = torch.randn(40, 2 * features), torch.randn(40, 33)  # all gates first
    paired = grad.view(40, 2, features).transpose(1, 2).reshape(40, 2 * features)
    out = grouped_wgrad(paired, rows, torch.zeros(2, 2 * features, 33), offsets, paired=True)
    assert_close(out, reference.grouped_wgrad(grad.double(), rows.double(), offsets.tolist(), 2), 1e-5)


def test_no_trained_expert():
    none = torch.zeros(0, 8, 4)
    assert grouped_wgrad(torch.randn(5, 8), torch.randn(5, 4), none, torch.zeros(1, dtype=torch.int64)).numel() == 0


def test_no_row():
    like = torch.ones(2, 8, 4)
    out = grouped_wgrad(torch.randn(0, 8), torch.randn(0, 4), like, torch.zeros(3, dtype=torch.int64))
    assert torch.equal(out, torch.zeros(2, 8, 4))


# Blocks are 32 by 64 features and 16 rows here: a block and one more, less than one, and whole ones.
@pytest.mark.parametrize(("out_features", "in_features"), [(33, 65), (9, 20), (32, 66), (34, 64), (64, 128)])
@pytest.mark.parametrize("gather", [False, True])
def test_nothing_outside_the_tensors_is_touched_at_any_size(out_features, in_features, gather):
    offsets = torch.tensor([0, 19])
    grad, rows = torch.randn(19, out_features), torch.randn(19, in_features)
    index = torch.randperm(19)
    out = grouped_wgrad(
        grad, rows, torch.zeros(1, out_features, in_features), offsets, index if gather else None, index
    )  # fmt: skip
    expected = (grad[index] if gather else grad).double().T @ rows[index].double()
    assert_close(out[0], expected, 1e-5)


@pytest.mark.parametrize("splits", [1, 2])
def test_paired_columns_of_a_gradient_in_pieces(splits, monkeypatch):
    monkeypatch.setattr(op, "splits_for", lambda tensor, programs: splits)
    offsets = torch.tensor([0, 3, 40])
    grad, rows = torch.randn(40, 2 * 9), torch.randn(40, 5)
    paired = grad.view(40, 2, 9).transpose(1, 2).reshape(40, 2 * 9)
    out = grouped_wgrad(paired, rows, torch.zeros(2, 2 * 9, 5, dtype=torch.float32), offsets, paired=True)
    assert_close(out, reference.grouped_wgrad(grad.double(), rows.double(), offsets.tolist(), 2), 1e-5)


def test_what_tiles_and_splits_are_asked_for(monkeypatch):
    asked, real = [], op.tiles_for
    monkeypatch.setattr(op, "tiles_for", lambda tensor, *args: asked.append(args) or real(tensor, *args))
    monkeypatch.setattr(op, "splits_for", lambda tensor, programs: asked.append(programs) or 1)
    grad, rows, like = torch.randn(5, 70), torch.randn(5, 65), torch.zeros(2, 70, 65)
    grouped_wgrad(grad, rows, like, torch.tensor([0, 3, 5]))
    assert asked == [("wgrad", 0, (70, 65)), 2 * 3 * 2]  # two experts, three tiles of 32 by two of 64


@pytest.mark.parametrize("far", ["grad", "rows"])
def test_a_row_past_what_32_bit_offsets_reach(far, tmp_path):
    offsets, index = torch.tensor([0, 17, 19]), torch.randint(0, 2**27, (19,))
    index[::5] = 2**27 - 1 - torch.arange(4)  # times 32 features
    huge = sparse(tmp_path / "huge", 2**27, 32, dtype=torch.float16)
    huge[index] = torch.randn(19, 32).half()
    other = torch.randn(19, 24).half()
    if far == "grad":
        out = grouped_wgrad(huge, other, torch.zeros(2, 32, 24, dtype=torch.float16), offsets, grad_index_N=index)
        expected = reference.grouped_wgrad(huge[index].double(), other.double(), offsets.tolist(), 2)
    else:
        out = grouped_wgrad(other, huge, torch.zeros(2, 24, 32, dtype=torch.float16), offsets, rows_index_N=index)
        expected = reference.grouped_wgrad(other.double(), huge[index].double(), offsets.tolist(), 2)
    assert_close(out, expected, TOLERANCE[torch.float16])


def test_a_gradient_past_what_32_bit_offsets_reach(tmp_path, monkeypatch):
    """The third expert's begins at 2 * 2**30."""
    offsets, grad, rows = torch.tensor([0, 3, 7, 9]), torch.randn(9, 8).half(), torch.randn(9, 4).half()
    huge = sparse(tmp_path / "gradient", 2**31 + 32, dtype=torch.float16).as_strided((3, 8, 4), (2**30, 4, 1))
    monkeypatch.setattr(torch, "empty_like", lambda like: huge)
    monkeypatch.setattr(op, "splits_for", lambda tensor, programs: 1)
    out = grouped_wgrad(grad, rows, torch.zeros(3, 8, 4, dtype=torch.float16), offsets)
    assert_close(out, reference.grouped_wgrad(grad.double(), rows.double(), offsets.tolist(), 3), 1e-3)


def test_a_piece_past_what_32_bit_offsets_reach(tmp_path, monkeypatch):
    """The third piece begins at 2 * 2**30."""
    offsets, grad, rows = torch.tensor([0, 40]), torch.randn(40, 8), torch.randn(40, 4)
    huge = sparse(tmp_path / "pieces", 2**31 + 32, dtype=torch.float32).as_strided((3, 1, 8, 4), (2**30, 32, 4, 1))
    monkeypatch.setattr(torch, "empty", lambda *sizes, **kwargs: huge)
    monkeypatch.setattr(op, "splits_for", lambda tensor, programs: 3)
    out = grouped_wgrad(grad, rows, torch.zeros(1, 8, 4), offsets)
    assert_close(out, reference.grouped_wgrad(grad.double(), rows.double(), offsets.tolist(), 1), 1e-5)
    assert huge[2].any(), "the third piece has the last eight rows"


@pytest.mark.parametrize(("columns", "gathered"), [(12, "neither"), (12, "grad"), (12, "rows"), (13, "neither")])
def test_rows_that_lie_together_are_loaded_by_descriptors(columns, gathered, monkeypatch):
    monkeypatch.setattr(op, "_grouped_wgrad_kernel", kernel := Watched())
    index = torch.arange(5)
    with chosen_by(lambda *asked: replace(choose_tiles(*asked), descriptors=True)):
        grouped_wgrad(
            torch.randn(5, columns), torch.randn(5, 8), torch.zeros(2, columns, 8), torch.tensor([0, 3, 5]),
            index if gathered == "grad" else None, index if gathered == "rows" else None,
        )  # fmt: skip
    assert kernel.constants["GRAD_TILES"] == (gathered != "grad" and columns == 12)
    assert kernel.constants["ROW_TILES"] == (gathered != "rows")
    grouped_wgrad(torch.randn(5, 12), torch.randn(5, 8), torch.zeros(2, 12, 8), torch.tensor([0, 3, 5]))
    assert not kernel.constants["GRAD_TILES"] and not kernel.constants["ROW_TILES"]

import pytest
import torch

from esft_kernels import routing as twin

pytest.importorskip("triton")
from esft_kernels.triton_ops import route as op
from tests.esft_kernels.bounds import check_bounds, poison_masked


@pytest.fixture(autouse=True)
def _strict(monkeypatch):
    poison_masked(monkeypatch)
    check_bounds(monkeypatch)


def check(ids, position, num_trained, num_positions, adapter_T=None) -> None:
    """Equal to the twin, in every table."""
    found = op.route(ids, position, num_trained, num_positions, adapter_T)
    expected = twin.route(ids, position, num_trained, True, num_positions, adapter_T)
    assert found.num_trained == expected.num_trained == num_trained
    for name in ("token_N", "slot_N", "row_TK", "offsets_E1"):
        mine, theirs = getattr(found, name), getattr(expected, name)
        assert mine.dtype == theirs.dtype == torch.int64 and torch.equal(mine, theirs), name


def choice(tokens: int, top_k: int, used: list[int]) -> torch.Tensor:
    chosen = [torch.tensor(used)[torch.randperm(len(used))[:top_k]] for _ in range(tokens)]
    return torch.stack(chosen) if chosen else torch.empty(0, top_k, dtype=torch.int64)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("trained", [0, 3, 7])
@pytest.mark.parametrize(
    ("tokens", "top_k", "used"),
    [(37, 3, range(7)), (1, 2, range(7)), (0, 2, range(7)), (5, 0, range(7)), (40, 2, (1, 5)), (60, 1, (6,))],
)
def test_rows_are_those_of_a_stable_sort(tokens, top_k, used, trained, dtype):
    check(choice(tokens, top_k, list(used)).to(dtype), torch.randperm(7), trained, 7)


@pytest.mark.parametrize(("shares", "work"), [(1, 8192), (2, 256), (3, 8192), (128, 64)])
def test_however_many_programs_share_the_slots(shares, work, monkeypatch):
    """Sixteen slots or more a block, and as many programs as blocks or fewer."""
    monkeypatch.setattr(op, "_SHARES", shares)
    monkeypatch.setattr(op, "_WORK", work)
    check(choice(67, 3, list(range(7))), torch.randperm(7), 2, 7)
    check(choice(16, 2, list(range(4))), torch.randperm(4), 2, 4)  # whole blocks


@pytest.mark.parametrize("experts", [1, 3, 4, 255, 256, 300])
def test_positions_up_to_a_power_of_two_and_past_it(experts):
    check(choice(40, min(experts, 4), list(range(experts))), torch.randperm(experts), experts // 2, experts)


def test_experts_that_are_elsewhere_come_last():
    ids = choice(20, 3, list(range(5)))
    ids[::2, 1] = 5
    ids[3, 0] = 1000
    check(ids, torch.randperm(5), 2, 5)
    check(ids, torch.zeros(5, dtype=torch.int64), 0, 0)  # none is here
    assert [op.route(ids, torch.arange(5), 2, 5, elsewhere=said).elsewhere for said in (False, True)] == [False, True]


def test_an_id_below_zero_is_of_an_expert_elsewhere_too():
    """On a GPU nobody has looked whether there are such."""
    below, position = choice(20, 3, list(range(5))), torch.randperm(5)
    beyond = below.clone()
    below[3, 0], beyond[3, 0] = -1, 5
    found, expected = op.route(below, position, 2, 5), twin.route(beyond, position, 2, True, 5)
    assert torch.equal(found.row_TK, expected.row_TK) and torch.equal(found.offsets_E1, expected.offsets_E1)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_each_token_is_looked_up_in_its_adapters_row(dtype):
    table = torch.stack([torch.randperm(9)[:5] for _ in range(3)])
    adapters = torch.randint(3, (23,)).to(dtype)
    check(choice(23, 2, list(range(5))), table, 4, 9, adapters)
    ids = choice(23, 2, list(range(6)))  # 5 is elsewhere, and no other adapter's 0
    check(ids, table, 4, 9, adapters)


def test_tensors_that_do_not_lie_in_order_are_read_as_they_are():
    ids = choice(12, 3, list(range(6)))
    wide = torch.stack([ids, ids + 100], dim=2)[:, :, 0]
    assert not wide.is_contiguous()
    check(wide, torch.randperm(12)[::2].argsort(), 2, 6)


def test_a_batch_of_too_many_rows_is_refused():
    ids = torch.zeros(1, dtype=torch.int64).expand(2**29, 4)
    with pytest.raises(ValueError, match=r"fewer than 2\*\*31 rows, got 2,147,483,648"):
        op.route(ids, torch.arange(4), 1, 4)

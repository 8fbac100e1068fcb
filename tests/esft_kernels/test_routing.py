import dataclasses

import pytest
import torch

from esft_kernels.routing import expert_order, positions_of, route


def test_expert_order_puts_trained_first_in_the_given_order():
    assert expert_order([4, 1], 6) == [4, 1, 0, 2, 3, 5]
    assert expert_order([], 3) == [0, 1, 2]
    assert expert_order([2, 0, 1], 3) == [2, 0, 1]


@pytest.mark.parametrize(
    ("trained", "message"),
    [
        ([5, 6, 0, -1], r"trained experts \[6, -1\] are not in a layer of 6 experts$"),
        ([1, 0, 1], r"trained experts \[1, 0, 1\] hold a duplicate$"),
        ((1, 0, 1), r"trained experts \[1, 0, 1\] hold a duplicate$"),
    ],
)
def test_expert_order_refuses(trained, message):
    with pytest.raises(ValueError, match=message):
        expert_order(trained, 6)


def test_route_groups_rows_by_position_and_keeps_token_order():
    # Experts 0, 1, 2 stand at positions 1, 2, 0: expert 2 is the trained one.
    routing = route(torch.tensor([[0, 2], [2, 1], [0, 1]]), torch.tensor([1, 2, 0]), num_trained=1)
    assert routing.offsets_E1.tolist() == [0, 2, 4, 6]
    assert routing.token_N.tolist() == [0, 1, 0, 2, 1, 2]
    assert routing.slot_N.tolist() == [1, 2, 0, 4, 3, 5]
    assert routing.row_TK.tolist() == [[2, 0], [1, 4], [3, 5]]
    assert (routing.num_tokens, routing.top_k, routing.num_rows, routing.num_experts) == (3, 2, 6, 3)
    assert (routing.num_trained, routing.prefix_rows()) == (1, 2)


@pytest.mark.parametrize("trained", [0, 1, 2, 3])
def test_the_prefix_holds_the_rows_of_the_trained_experts(trained):
    routing = route(torch.tensor([[0, 2], [2, 1], [0, 2]]), torch.tensor([1, 2, 0]), num_trained=trained)
    assert routing.prefix_rows() == [0, 3, 5, 6][trained]
    assert isinstance(routing.prefix_rows(), int)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_the_tables_are_of_64_bit_integers(dtype):
    routing = route(torch.tensor([[0, 2], [2, 1]], dtype=dtype), torch.tensor([1, 2, 0]), num_trained=1)
    tables = (routing.token_N, routing.slot_N, routing.row_TK, routing.offsets_E1)
    assert [t.dtype for t in tables] == [torch.int64] * 4
    assert [t.tolist() for t in tables] == [[0, 1, 0, 1], [1, 2, 0, 3], [[2, 0], [1, 3]], [0, 2, 3, 4]]


def test_the_rows_of_an_expert_keep_token_order_however_many_there_are():
    # Short runs are sorted by insertion, which is stable whatever is asked for; long ones are not.
    ids = torch.stack([torch.randperm(3)[:2] for _ in range(500)])
    position = torch.tensor([2, 0, 1])
    routing = route(ids, position, num_trained=1)
    expected = [slot for expert in (1, 2, 0) for slot, found in enumerate(ids.reshape(-1).tolist()) if found == expert]
    assert routing.slot_N.tolist() == expected
    assert routing.token_N.tolist() == [slot // 2 for slot in expected]


def test_row_is_the_inverse_of_slot():
    ids = torch.stack([torch.randperm(9)[:4] for _ in range(17)])
    routing = route(ids, torch.randperm(9), num_trained=3)
    assert torch.equal(routing.row_TK.reshape(-1)[routing.slot_N], torch.arange(68))
    assert torch.equal(routing.token_N, routing.slot_N // 4)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
@pytest.mark.parametrize("elsewhere", [False, True])
def test_route_without_a_row(shape, elsewhere):
    routing = route(torch.empty(shape, dtype=torch.int64), torch.arange(5), num_trained=2, elsewhere=elsewhere)
    assert routing.offsets_E1.tolist() == [0] * 6
    assert routing.prefix_rows() == routing.num_rows == 0
    assert (routing.num_tokens, routing.top_k, routing.row_TK.shape) == (*shape, shape)


@pytest.mark.parametrize("bad", [-1, 4])
def test_route_names_the_first_id_out_of_range(bad):
    ids = torch.tensor([[0, 3], [2, bad], [9, -9]])
    with pytest.raises(ValueError, match=rf"^top_k_index\[1, 1\] is {bad}, not an expert in 0..3$"):
        route(ids, torch.arange(4), num_trained=0)


def test_experts_that_are_elsewhere_come_last():
    ids = torch.tensor([[0, 4], [7, 1], [4, 4], [2, 0]])
    routing = route(ids, torch.tensor([1, 2, 0, 3]), num_trained=1, elsewhere=True)
    assert routing.offsets_E1.tolist() == [0, 1, 3, 4, 4]
    assert routing.slot_N.tolist() == [6, 0, 7, 3, 1, 2, 4, 5]
    assert (routing.num_rows, routing.num_experts) == (8, 4)
    with pytest.raises(ValueError, match=r"^top_k_index\[0, 0\] is -1, not an expert$"):
        route(ids - 1, torch.arange(4), num_trained=0, elsewhere=True)
    with pytest.raises(ValueError, match=r"top_k_index\[0, 1\] is 4, not an expert in 0..3"):
        route(ids, torch.arange(4), num_trained=0)


def test_experts_of_another_rank_have_no_position_here_and_their_rows_no_expert():
    ids = torch.tensor([[0, 2], [3, 1], [4, 2]])  # 4 is of no rank
    routing = route(ids, torch.tensor([1, 2, 0, 2]), num_trained=1, elsewhere=True, num_positions=2)
    assert routing.offsets_E1.tolist() == [0, 2, 3] and routing.slot_N.tolist() == [1, 5, 0, 2, 3, 4]
    assert (routing.rows_here(), routing.prefix_rows(), routing.num_rows, routing.num_experts) == (3, 2, 6, 2)
    all_here = route(ids[:2], torch.arange(4), num_trained=1)
    assert all_here.rows_here() == all_here.num_rows == 4


def test_a_rank_may_hold_no_expert():
    routing = route(
        torch.tensor([[0, 2], [1, 0]]), torch.zeros(3, dtype=torch.int64), 0, elsewhere=True, num_positions=0
    )
    assert routing.offsets_E1.tolist() == [0] and routing.num_experts == routing.rows_here() == 0
    assert routing.num_rows == 4


@pytest.mark.parametrize("debug", [None, "0", "1"])
def test_ids_on_a_device_are_looked_at_only_in_debugging(debug, monkeypatch):
    monkeypatch.delenv("ESFT_DEBUG", raising=False)
    if debug is not None:
        monkeypatch.setenv("ESFT_DEBUG", debug)
    ids = torch.zeros(3, 2, dtype=torch.int64, device="meta")  # has no values: to look at them is an error
    position = torch.arange(4, device="meta")
    if debug == "1":
        with pytest.raises(RuntimeError, match="meta"):
            route(ids, position, num_trained=1)
        return
    for elsewhere in (False, True):
        routing = route(ids, position, num_trained=1, elsewhere=elsewhere)
        tables = (routing.token_N, routing.slot_N, routing.row_TK, routing.offsets_E1)
        assert [tuple(t.shape) for t in tables] == [(6,), (6,), (3, 2), (5,)]
        assert {t.device.type for t in tables} == {"meta"}


@pytest.mark.parametrize(
    "ids",
    [
        torch.zeros(3, dtype=torch.int64),
        torch.zeros(3, 2, 1, dtype=torch.int64),
        torch.zeros(3, 2),
        torch.zeros(3, 2).to(torch.int16),
    ],
)
def test_route_refuses_what_is_not_a_top_k_index(ids):
    found = f"got {ids.dtype} {tuple(ids.shape)}".replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(ValueError, match=rf"top_k_index must be an integer \[T, K\] tensor, {found}$"):
        route(ids, torch.arange(4), num_trained=0)


def test_a_routing_cannot_be_changed():
    routing = route(torch.tensor([[0, 1]]), torch.arange(2), num_trained=1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        routing.num_trained = 2  # pyright: ignore[reportAttributeAccessIssue]


# Experts 0, 1, 2 of the base at 3, 4, 5; one adapter has its own 2 and 0 at 0 and 1, another its own 2 at 2.
TABLE = torch.tensor([[3, 4, 5], [1, 4, 0], [3, 4, 2]])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_a_token_is_routed_by_the_row_of_its_adapter(dtype):
    ids, adapters = torch.tensor([[0, 2], [2, 1], [0, 1], [2, 0]]), torch.tensor([0, 1, 1, 2], dtype=dtype)
    assert positions_of(ids, TABLE, adapters).tolist() == [[3, 5], [0, 4], [1, 4], [2, 3]]
    routing = route(ids, TABLE, num_trained=3, num_positions=6, adapter_T=adapters)
    assert routing.offsets_E1.tolist() == [0, 1, 2, 3, 5, 7, 8]
    assert routing.slot_N.tolist() == [2, 4, 6, 0, 7, 3, 5, 1]
    assert (routing.num_experts, routing.prefix_rows()) == (6, 3)
    alike = route(ids, TABLE, num_trained=3, num_positions=6, adapter_T=adapters * 0 + 1)
    one = route(ids, TABLE[1], num_trained=3, num_positions=6)
    assert [torch.equal(vars(alike)[name], vars(one)[name]) for name in list(vars(one))[:4]] == [True] * 4


def test_experts_elsewhere_come_last_for_every_adapter():
    ids, adapters = torch.tensor([[0, 3], [7, 2], [1, 2]]), torch.tensor([1, 2, 0])
    routing = route(ids, TABLE, 3, elsewhere=True, num_positions=6, adapter_T=adapters)
    assert routing.slot_N.tolist() == [0, 3, 4, 5, 1, 2]
    assert routing.offsets_E1.tolist() == [0, 0, 1, 2, 2, 3, 4]


@pytest.mark.parametrize(
    ("position", "adapters", "message"),
    [
        (TABLE, None, r"positions \(3, 3\) need adapters"),
        (TABLE[0], torch.tensor([0, 1]), r"positions \(3,\) have no adapters"),
        (TABLE, torch.tensor([0]), r"integer \[T\] tensor for 2 tokens, got torch.int64 \(1,\)"),
        (TABLE, torch.tensor([0.0, 1.0]), r"integer \[T\] tensor for 2 tokens, got torch.float32 \(2,\)"),
        (TABLE, torch.tensor([0, 3]), r"adapters must be in 0..2, got \[0, 3\]"),
        (TABLE, torch.tensor([-1, 2]), r"adapters must be in 0..2, got \[-1, 2\]"),
    ],
)
def test_route_refuses_adapters_that_do_not_fit(position, adapters, message):
    with pytest.raises(ValueError, match=message):
        route(torch.tensor([[0, 2], [2, 1]]), position, 3, num_positions=6, adapter_T=adapters)


def test_an_id_out_of_range_is_not_taken_for_another_adapters_expert():
    with pytest.raises(ValueError, match=r"^top_k_index\[0, 0\] is 3, not an expert in 0..2$"):
        route(torch.tensor([[3, 2]]), TABLE, 3, num_positions=6, adapter_T=torch.tensor([0]))

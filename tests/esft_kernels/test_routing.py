import pytest
import torch

from esft_kernels.routing import expert_order, route


def test_expert_order_puts_trained_first_in_the_given_order():
    assert expert_order([4, 1], 6) == [4, 1, 0, 2, 3, 5]
    assert expert_order([], 3) == [0, 1, 2]
    assert expert_order([2, 0, 1], 3) == [2, 0, 1]


@pytest.mark.parametrize(("trained", "message"), [([6], "not in a layer of 6"), ([-1], "not in"), ([1, 1], "duplic")])
def test_expert_order_refuses(trained, message):
    with pytest.raises(ValueError, match=message):
        expert_order(trained, 6)


def test_route_groups_rows_by_position_and_keeps_token_order():
    # Experts 0, 1, 2 stand at positions 1, 2, 0: expert 2 is the trained one.
    routing = route(torch.tensor([[0, 2], [2, 1], [0, 1]]), torch.tensor([1, 2, 0]), num_trained=1)
    assert routing.offsets_E1.tolist() == [0, 2, 4, 6]
    assert routing.token_N.tolist() == [0, 1, 0, 2, 1, 2]
    assert routing.slot_N.tolist() == [1, 2, 0, 4, 3, 5]
    assert (routing.num_tokens, routing.top_k, routing.num_rows, routing.num_experts) == (3, 2, 6, 3)
    assert routing.prefix_rows() == 2


def test_row_is_the_inverse_of_slot():
    ids = torch.stack([torch.randperm(9)[:4] for _ in range(17)])
    routing = route(ids, torch.randperm(9), num_trained=3)
    assert torch.equal(routing.row_TK.reshape(-1)[routing.slot_N], torch.arange(68))
    assert torch.equal(routing.token_N, routing.slot_N // 4)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_route_without_tokens(dtype):
    routing = route(torch.empty(0, 4, dtype=dtype), torch.arange(5), num_trained=2)
    assert routing.offsets_E1.tolist() == [0] * 6
    assert routing.prefix_rows() == routing.num_rows == 0


@pytest.mark.parametrize("bad", [-1, 4])
def test_route_names_an_id_out_of_range(bad):
    ids = torch.tensor([[0, 1], [2, bad]])
    with pytest.raises(ValueError, match=rf"top_k_index\[1, 1\] is {bad}, not an expert in 0..3"):
        route(ids, torch.arange(4), num_trained=0)


def test_experts_that_are_elsewhere_come_last():
    ids = torch.tensor([[0, 4], [7, 1], [4, 4], [2, 0]])
    routing = route(ids, torch.tensor([1, 2, 0, 3]), num_trained=1, elsewhere=True)
    assert routing.offsets_E1.tolist() == [0, 1, 3, 4, 4]
    assert routing.slot_N.tolist() == [6, 0, 7, 3, 1, 2, 4, 5]
    with pytest.raises(ValueError, match=r"top_k_index\[0, 0\] is -1, not an expert"):
        route(ids - 1, torch.arange(4), num_trained=0, elsewhere=True)


@pytest.mark.parametrize("ids", [torch.zeros(3, dtype=torch.int64), torch.zeros(3, 2)])
def test_route_refuses_what_is_not_a_top_k_index(ids):
    with pytest.raises(ValueError, match="top_k_index"):
        route(ids, torch.arange(4), num_trained=0)

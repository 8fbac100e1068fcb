import pytest
import torch

from esft_kernels import routing as twin
from esft_kernels.triton_ops import route as op
from tests.gpu.device import DEVICE, sized

TABLES = ("token_N", "slot_N", "row_TK", "offsets_E1")


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "adapters"),
    sized([(125_000, 8, 256, 0), (1_000_000, 1, 8, 0), (170_000, 6, 64, 5), (3, 4, 64, 0), (0, 4, 64, 0)],
          [(70, 3, 40, 0), (9, 2, 7, 3)]),
)  # fmt: skip
def test_rows_are_those_of_a_stable_sort(tokens, top_k, experts, adapters, dtype):
    ids = torch.rand(tokens, experts).topk(top_k).indices.to(DEVICE, dtype)
    position = torch.stack([torch.randperm(experts) for _ in range(max(adapters, 1))]).to(DEVICE)
    adapter_T = torch.randint(adapters, (tokens,), device=DEVICE) if adapters else None
    args = ids, position if adapters else position[0], experts // 3
    found = op.route(*args, experts, adapter_T)
    expected = twin.route(*args, False, experts, adapter_T)
    for name in TABLES:
        mine, theirs = getattr(found, name), getattr(expected, name)
        assert mine.dtype == torch.int64 and torch.equal(mine, theirs), name


def test_experts_elsewhere_come_last():
    ids = torch.randint(80, (sized(100_000, 50), 6), device=DEVICE)
    position = torch.randperm(64).to(DEVICE)
    found, expected = op.route(ids, position, 20, 64, None, True), twin.route(ids, position, 20, True, 64)
    for name in TABLES:
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert found.rows_here() == int((ids < 64).sum())

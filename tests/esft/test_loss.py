import pytest
import torch
import torch.nn.functional as F
from esft.loss import linear_cross_entropy

from esft import loss


@pytest.mark.parametrize("rows", [0, 1, 7, 20])
@pytest.mark.parametrize("train_head", [True, False])
def test_value_and_gradients_equal_those_of_whole_logits(monkeypatch, rows: int, train_head: bool):
    monkeypatch.setattr(loss, "CHUNK_ROWS", 7)
    hidden = torch.randn(rows, 6, requires_grad=True)
    weight = torch.randn(11, 6, requires_grad=train_head)
    labels = torch.randint(0, 11, (rows,))
    total = linear_cross_entropy(hidden, weight, labels)
    expected = F.cross_entropy(hidden.double() @ weight.double().T, labels, reduction="sum")
    torch.testing.assert_close(total.double(), expected, atol=1e-5, rtol=1e-5)
    wanted = [hidden, weight] if train_head else [hidden]
    for ours, theirs in zip(
        torch.autograd.grad(total * 0.5, wanted), torch.autograd.grad(expected * 0.5, wanted), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)

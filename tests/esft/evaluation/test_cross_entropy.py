import pytest
import torch
import torch.nn.functional as F

from esft.evaluation import cross_entropy as loss
from esft.evaluation.cross_entropy import CHUNK_ROWS, FEWEST_ROWS, chunk_rows, linear_cross_entropy


def case(rows: int, train_hidden: bool = True, train_head: bool = True, dtype: torch.dtype = torch.float32):
    hidden = torch.randn(rows, 6).to(dtype).requires_grad_(train_hidden)
    weight = torch.randn(11, 6).to(dtype).requires_grad_(train_head)
    return hidden, weight, torch.randint(0, 11, (rows,))


def of_whole_logits(hidden, weight, labels):
    return F.cross_entropy(hidden.double() @ weight.double().T, labels, reduction="sum")


@pytest.mark.parametrize("rows", [0, 1, 7, 20])
@pytest.mark.parametrize(("train_hidden", "train_head"), [(True, True), (True, False), (False, True)])
def test_value_and_gradients_equal_those_of_whole_logits(monkeypatch, rows: int, train_hidden: bool, train_head: bool):
    monkeypatch.setattr(loss, "CHUNK_ROWS", 7)
    hidden, weight, labels = case(rows, train_hidden, train_head)
    total = linear_cross_entropy(hidden, weight, labels)
    expected = of_whole_logits(hidden, weight, labels)
    assert total.dtype == torch.float32 and total.shape == ()
    torch.testing.assert_close(total.double(), expected, atol=1e-5, rtol=1e-5)
    wanted = [tensor for tensor in (hidden, weight) if tensor.requires_grad]
    for ours, theirs in zip(
        torch.autograd.grad(total * 0.5, wanted), torch.autograd.grad(expected * 0.5, wanted), strict=True
    ):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_values_far_apart_do_not_overflow():
    hidden, weight = torch.tensor([[1e4], [1e4]]), torch.tensor([[1.0], [-1.0]])
    assert linear_cross_entropy(hidden, weight, torch.tensor([0, 1])).item() == 2e4


def test_without_gradients_the_value_is_the_same_and_none_are_formed(monkeypatch):
    hidden, weight, labels = case(9)
    expected = of_whole_logits(hidden, weight, labels).float()
    formed = []
    real = torch.mm
    monkeypatch.setattr(torch, "mm", lambda *args, **named: formed.append(1) or real(*args, **named))
    torch.testing.assert_close(linear_cross_entropy(hidden.detach(), weight.detach(), labels), expected)
    assert not formed
    linear_cross_entropy(hidden, weight, labels)
    assert formed


def test_the_loss_is_where_the_hidden_states_are():
    assert linear_cross_entropy(*(tensor.to("meta") for tensor in case(9))).is_meta


def test_16_bit_values_are_summed_in_float32(monkeypatch):
    monkeypatch.setattr(loss, "CHUNK_ROWS", 3)
    hidden, weight, labels = case(300, dtype=torch.bfloat16)
    total = linear_cross_entropy(hidden, weight, labels)
    total.backward()
    logits = hidden.detach() @ weight.detach().T  # rounded to bfloat16, as in a model
    expected = F.cross_entropy(logits.float(), labels, reduction="sum")
    assert total.dtype == torch.float32
    torch.testing.assert_close(total.detach(), expected, atol=0, rtol=1e-5)
    grad_logits = logits.float().softmax(-1) - F.one_hot(labels, 11)
    for grad, wanted in (
        (hidden.grad, grad_logits @ weight.detach().float()),
        (weight.grad, grad_logits.T @ hidden.detach().float()),
    ):
        assert grad.dtype == torch.bfloat16
        # One rounding of the logits' gradients and one of what is made of them; a sum in bfloat16 would miss by more.
        assert (grad.float() - wanted).norm() < 2**-8 * wanted.norm()


def test_no_chunk_of_logits_is_larger_than_it_should_be(monkeypatch):
    monkeypatch.setattr(loss, "CHUNK_LOGITS", 4 * 11)  # four rows of a vocabulary of eleven
    monkeypatch.setattr(loss, "FEWEST_ROWS", 1)
    hidden, weight, labels = case(10)
    seen = []
    real = torch.Tensor.log_softmax
    monkeypatch.setattr(torch.Tensor, "log_softmax", lambda x, dim: seen.append(tuple(x.shape)) or real(x, dim))
    linear_cross_entropy(hidden, weight, labels)
    assert seen == [(4, 11), (4, 11), (2, 11)]


def test_a_gradient_of_the_gradient_is_refused():
    hidden, weight, labels = case(3)
    scale = torch.ones((), requires_grad=True)
    total = scale * linear_cross_entropy(hidden, weight, labels)
    (grad,) = torch.autograd.grad(total, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_of_a_large_vocabulary_fewer_rows_are_taken_together_but_never_too_few_to_multiply():
    assert chunk_rows(8192) == chunk_rows(11) == CHUNK_ROWS
    assert chunk_rows(102_400) == 163  # 200 MB at 12 bytes a logit
    assert chunk_rows(10**9) == FEWEST_ROWS

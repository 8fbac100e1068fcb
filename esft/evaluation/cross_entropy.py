"""Next-token cross entropy that never holds more than one chunk of logits."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK_ROWS = 512  # 512 x 8192 float32 logits are 16 MB: they stay in a last-level cache
CHUNK_LOGITS = 1 << 24  # of a large vocabulary fewer rows at a time: each logit takes 12 bytes on its way
FEWEST_ROWS = 64  # below, reading the head takes longer than multiplying with it


def chunk_rows(vocabulary: int) -> int:
    """Rows whose logits are made together."""
    return min(CHUNK_ROWS, max(FEWEST_ROWS, CHUNK_LOGITS // vocabulary))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels):  # pyright: ignore[reportIncompatibleMethodOverride]
        # The gradients are formed here, chunk by chunk while the logits are at hand, and scaled in backward.
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        chunk = chunk_rows(weight.shape[0])
        for start in range(0, hidden.shape[0], chunk):
            rows = slice(start, start + chunk)
            log_probs = (hidden[rows] @ weight.T).float().log_softmax(dim=-1)
            picked = labels[rows, None]
            total -= log_probs.gather(1, picked).sum()
            if not (need_hidden or need_weight):
                continue
            grad_logits = log_probs.exp_().scatter_add_(1, picked, log_probs.new_full(picked.shape, -1.0))
            grad_logits = grad_logits.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad_logits, weight, out=grad_hidden[rows])
            if grad_weight is not None:
                grad_weight += grad_logits.T @ hidden[rows]
            del log_probs, grad_logits  # before the next chunk's are made
        ctx.save_for_backward(*(g for g in (grad_hidden, grad_weight) if g is not None))
        ctx.need, ctx.weight_dtype = (need_hidden, need_weight), weight.dtype
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_total):  # pyright: ignore[reportIncompatibleMethodOverride]
        saved = list(ctx.saved_tensors)
        grad_hidden = saved.pop(0) * grad_total if ctx.need[0] else None
        grad_weight = None
        if ctx.need[1]:
            exact = saved.pop(0)
            grad_weight = torch.empty_like(exact, dtype=ctx.weight_dtype)
            for part, whole in zip(grad_weight.split(CHUNK_ROWS), exact.split(CHUNK_ROWS), strict=True):
                part.copy_(whole * grad_total)  # in pieces: no second float32 copy
        return grad_hidden, grad_weight, None


def linear_cross_entropy(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> Tensor:
    """Sum over rows of the cross entropy of ``hidden @ weight.T`` against the labels, a float32 scalar in nats.

    Args:
        hidden_ND: [N, D], the supervised positions only.
        weight_VD: [V, D], the language-model head.
        labels_N: int64 [N] in ``range(V)``.
    """
    return _LinearCrossEntropy.apply(hidden_ND, weight_VD, labels_N)  # pyright: ignore[reportReturnType]

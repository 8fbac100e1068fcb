"""Triton: a step of AdamW in one pass, over all that is kept of a parameter's elements."""

# Launches take more than the kernel signature that triton.jit passes on to the type checker.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024  # of four warps: a thread has eight elements, 16 bytes of a dtype of 16 bits


@triton.jit
def _adamw_kernel(
    weight_ptr,  # bf16, fp16 or fp32 [N]
    beside_ptr,  # int16 or fp32 [N], or None
    gradient_ptr,  # bf16, fp16 or fp32 [N]
    mean_ptr, square_ptr,  # fp32 [N]
    shrink_ptr,  # fp32 [1]
    count, decay, beta1, rest1, beta2, rest2, rate, root_scale, eps, BLOCK_N: tl.constexpr,
):  # fmt: skip
    n_N = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_N = n_N < count
    gradient_N = tl.load(gradient_ptr + n_N, mask=inside_N, other=0.0).to(tl.float32) * tl.load(shrink_ptr)
    weight_N = tl.load(weight_ptr + n_N, mask=inside_N, other=0.0)
    if beside_ptr is None:
        value_N = weight_N
    elif beside_ptr.dtype.element_ty == tl.int16:
        low_N = tl.load(beside_ptr + n_N, mask=inside_N, other=0).to(tl.int32)
        value_N = ((weight_N.to(tl.int16, bitcast=True).to(tl.int32) << 16) + low_N).to(tl.float32, bitcast=True)
    else:
        value_N = tl.load(beside_ptr + n_N, mask=inside_N, other=0.0)
    mean_N = beta1 * tl.load(mean_ptr + n_N, mask=inside_N, other=0.0) + rest1 * gradient_N
    square_N = beta2 * tl.load(square_ptr + n_N, mask=inside_N, other=0.0) + rest2 * gradient_N * gradient_N
    value_N -= decay * value_N
    value_N -= tl.div_rn(rate * mean_N, tl.sqrt_rn(square_N) * root_scale + eps)
    tl.store(mean_ptr + n_N, mean_N, mask=inside_N)
    tl.store(square_ptr + n_N, square_N, mask=inside_N)
    if beside_ptr is None:
        tl.store(weight_ptr + n_N, value_N, mask=inside_N)
    elif beside_ptr.dtype.element_ty == tl.int16:
        bits_N = value_N.to(tl.int32, bitcast=True)
        high_N = ((bits_N + 0x8000) >> 16).to(tl.int16)
        tl.store(beside_ptr + n_N, bits_N.to(tl.int16), mask=inside_N)
        tl.store(weight_ptr + n_N, high_N.to(weight_ptr.dtype.element_ty, bitcast=True), mask=inside_N)
    else:
        tl.store(beside_ptr + n_N, value_N, mask=inside_N)
        tl.store(weight_ptr + n_N, value_N.to(weight_ptr.dtype.element_ty), mask=inside_N)


def adamw_step(
    weight_N: Tensor,
    beside_N: Tensor | None,
    gradient_N: Tensor,
    mean_N: Tensor,
    square_N: Tensor,
    shrink: Tensor,
    step: int,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    eps: float,
) -> None:
    """What ``torch.optim.AdamW`` does to a float32 master of the weight, and the weight follows. All in place.

    Args:
        weight_N: bf16, fp16 or fp32; contiguous, as all are.
        beside_N: what the master has beside the weight. int16: the lower 16 bits of every float32, of which the weight
            is the upper ones, as both are added up. fp32: the master itself. None: the weight is it.
        gradient_N: bf16, fp16 or fp32; it is only read.
        mean_N, square_N: fp32, the moments.
        shrink: fp32, one element on the same device: a factor on the gradient.
        step: this one's number, from 1.
    """
    count = weight_N.numel()
    with torch.cuda.device_of(weight_N):  # Triton launches on the current device, which need not be that of the weight
        _adamw_kernel[(triton.cdiv(count, _BLOCK),)](
            weight_N, beside_N, gradient_N, mean_N, square_N, shrink, count, lr * weight_decay,
            beta1, 1 - beta1, beta2, 1 - beta2, lr / (1 - beta1**step), (1 - beta2**step) ** -0.5, eps, BLOCK_N=_BLOCK,
        )  # fmt: skip

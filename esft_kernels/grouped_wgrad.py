"""Triton: the weight gradients of the trained experts, which are the first positions of every routing."""

# Launches take more than the kernel signature that triton.jit passes on to the type checker.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .grouped_gemm import dot, exact_dot
from .tiles import choose_tiles, device_arch


@triton.jit
def _grouped_wgrad_kernel(
    grad_ptr, grad_index_ptr, rows_ptr, rows_index_ptr, out_ptr, offsets_ptr, out_features, in_features,
    EXACT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # One program owns one tile of one expert's gradient and walks over all its rows in order: no atomics, the
    # same bits every time, and an expert without rows gets its zeros from the accumulator.
    n_tiles = tl.cdiv(in_features, BLOCK_N)
    m_tiles = tl.cdiv(out_features, BLOCK_M)
    pid = tl.program_id(0)
    position = pid // (m_tiles * n_tiles)
    m_M = (pid // n_tiles % m_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    n_N = (pid % n_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_m_1M = (m_M < out_features)[None, :]
    in_n_1N = (n_N < in_features)[None, :]
    end = tl.load(offsets_ptr + position + 1)

    acc_MN = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first in range(tl.load(offsets_ptr + position), end, BLOCK_K):
        row_K = first + tl.arange(0, BLOCK_K)  # int64, like the offsets
        in_rows_K1 = (row_K < end)[:, None]
        grad_row_K = row_K
        if grad_index_ptr is not None:
            grad_row_K = tl.load(grad_index_ptr + row_K, mask=row_K < end, other=0)
        source_K = row_K
        if rows_index_ptr is not None:
            source_K = tl.load(rows_index_ptr + row_K, mask=row_K < end, other=0)
        grad_ptr_KM = grad_ptr + grad_row_K[:, None] * out_features + m_M[None, :]
        grad_KM = tl.load(grad_ptr_KM, mask=in_rows_K1 & in_m_1M, other=0.0)
        rows_ptr_KN = rows_ptr + source_K[:, None] * in_features + n_N[None, :]
        rows_KN = tl.load(rows_ptr_KN, mask=in_rows_K1 & in_n_1N, other=0.0)
        acc_MN = dot(tl.trans(grad_KM), rows_KN, acc_MN, EXACT)
    out_ptr += position.to(tl.int64) * out_features * in_features
    out_ptr_MN = out_ptr + m_M[:, None] * in_features + n_N[None, :]
    tl.store(out_ptr_MN, acc_MN.to(out_ptr.dtype.element_ty), mask=(m_M < out_features)[:, None] & in_n_1N)


def grouped_wgrad(
    grad_rows_XO: Tensor,
    rows_YI: Tensor,
    offsets_S1: Tensor,
    grad_index_N: Tensor | None = None,
    rows_index_N: Tensor | None = None,
) -> Tensor:
    """``grad_rows[e].T @ rows[e]`` for the positions 0..S-1, [S, O, I]; zeros for an expert without rows.

    Args:
        grad_rows_XO: contiguous [X, O], read at row n, or at row ``grad_index_N[n]``.
        rows_YI: contiguous [Y, I], read at row n, or at row ``rows_index_N[n]``.
        offsets_S1: contiguous int64 [S + 1], the front of a routing's offsets. No row past the last is read.
        grad_index_N, rows_index_N: int64, as long as the prefix or longer, or None.
    """
    num_trained, (out_features, in_features) = offsets_S1.numel() - 1, (grad_rows_XO.shape[1], rows_YI.shape[1])
    grad_SOI = torch.empty(num_trained, out_features, in_features, dtype=rows_YI.dtype, device=rows_YI.device)
    # The rows per trained expert are known to the device only, and not asked for.
    tiles = choose_tiles(device_arch(rows_YI.device), rows_YI.dtype, "wgrad", 0, (out_features, in_features))
    m_tiles, n_tiles = triton.cdiv(out_features, tiles.block_m), triton.cdiv(in_features, tiles.block_n)
    _grouped_wgrad_kernel[(num_trained * m_tiles * n_tiles,)](
        grad_rows_XO, grad_index_N, rows_YI, rows_index_N, grad_SOI, offsets_S1, out_features, in_features,
        EXACT=exact_dot(rows_YI), BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, BLOCK_K=tiles.block_k,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    return grad_SOI

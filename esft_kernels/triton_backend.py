"""The expert MLP on Triton kernels; the same two functions as ``reference``.

Nothing here waits for the device: the prefix length stays there, and launches and buffers are sized by an
upper bound. Rows past the last one asked for are neither read nor written.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .combine import combine
from .grouped_gemm import grouped_gemm
from .grouped_wgrad import grouped_wgrad
from .pools import ExpertPools, Gradients, Needs
from .routing import Routing
from .swiglu import swiglu, swiglu_backward


def forward(x_TD: Tensor, weights_TK: Tensor, pools: ExpertPools, routing: Routing) -> tuple[Tensor, Tensor]:
    """Output [T, D] and pre-activations H [N, 2F] of all routed experts."""
    with torch.cuda.device_of(x_TD):  # Triton launches on the current device, which need not be that of x
        offsets_E1, rows = routing.offsets_E1, routing.num_rows
        h_NG = grouped_gemm(
            x_TD, pools.trained_gate_up_SGD, pools.frozen_gate_up_RGD, offsets_E1, rows, index_N=routing.token_N
        )
        y_ND = grouped_gemm(swiglu(h_NG), pools.trained_down_SDF, pools.frozen_down_RDF, offsets_E1, rows)
        return combine(y_ND, routing.row_TK, weights_TK), h_NG


def backward(
    grad_out_TD: Tensor,
    x_TD: Tensor,
    h_NG: Tensor,
    weights_TK: Tensor,
    pools: ExpertPools,
    routing: Routing,
    needs: Needs,
) -> Gradients:
    """Gradients of ``forward``. Only the prefix of rows takes part when neither x nor weights need one."""
    with torch.cuda.device_of(x_TD):  # Triton launches on the current device, which need not be that of x
        offsets_S1 = routing.offsets_E1[: routing.num_trained + 1]
        offsets_P1 = routing.offsets_E1 if needs.all_rows else offsets_S1
        rows = h_NG.shape[0]
        grad_a_NF = grouped_gemm(
            grad_out_TD, pools.trained_down_SDF.mT, pools.frozen_down_RDF.mT, offsets_P1, rows, index_N=routing.token_N
        )
        grad_h_NG, weighted_a_NF, grad_weights_TK = swiglu_backward(grad_a_NF, h_NG, weights_TK, routing, needs)
        del grad_a_NF

        grad_x_TD = grad_gate_up_SGD = grad_down_SDF = None
        if needs.trained:
            assert grad_h_NG is not None and weighted_a_NF is not None
            grad_gate_up_SGD = grouped_wgrad(grad_h_NG, x_TD, offsets_S1, rows_index_N=routing.token_N)
            grad_down_SDF = grouped_wgrad(grad_out_TD, weighted_a_NF, offsets_S1, grad_index_N=routing.token_N)
            del weighted_a_NF
        if needs.x:
            assert grad_h_NG is not None
            grad_rows_ND = grouped_gemm(
                grad_h_NG, pools.trained_gate_up_SGD.mT, pools.frozen_gate_up_RGD.mT, routing.offsets_E1, rows
            )
            grad_x_TD = combine(grad_rows_ND, routing.row_TK)
        return Gradients(grad_x_TD, grad_weights_TK, grad_gate_up_SGD, grad_down_SDF)

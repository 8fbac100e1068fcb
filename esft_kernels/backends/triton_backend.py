"""The expert MLP on Triton kernels; the same three functions as ``reference``.

Nothing here waits for the device: launches and buffers are sized by an upper bound. Rows past the last one asked for
are neither read nor written. The columns of H are (gate, up) in turn, whatever the order of the weights.
"""

from __future__ import annotations

from itertools import islice

import torch
from torch import Tensor

from esft_kernels.backend import Gradients, Needs
from esft_kernels.backends.triton_parts import parts
from esft_kernels.pools import ExpertPools, ExpertWeights
from esft_kernels.routing import Routing, check_choice
from esft_kernels.triton_ops import route as routing_op
from esft_kernels.triton_ops.bias import bias_dot, bias_grad
from esft_kernels.triton_ops.combine import combine, combine_sums
from esft_kernels.triton_ops.decode import stack
from esft_kernels.triton_ops.grad_gemm import grad_gemm
from esft_kernels.triton_ops.grouped_gemm import grouped_gemm
from esft_kernels.triton_ops.grouped_wgrad import grouped_wgrad
from esft_kernels.triton_ops.up_gemm import up_gemm


def _paired(pools: ExpertPools) -> bool:
    return pools.activation.gated and not pools.interleaved


def _by_token(rows_ND: Tensor, routing: Routing) -> Tensor:
    return combine(rows_ND.view(*routing.row_TK.shape, rows_ND.shape[1]), routing.row_TK, routing.offsets_E1)


def route(
    top_k_index_TK: Tensor,
    position: Tensor,
    num_trained: int,
    elsewhere: bool = False,
    num_positions: int | None = None,
    adapter_T: Tensor | None = None,
) -> Routing:
    """``esft_kernels.routing.route`` in two launches."""
    check_choice(top_k_index_TK, position, elsewhere, adapter_T)
    positions = position.shape[-1] if num_positions is None else num_positions
    with torch.cuda.device_of(top_k_index_TK):
        return routing_op.route(top_k_index_TK, position, num_trained, positions, adapter_T, elsewhere)


def forward(
    x_TD: Tensor, weights_TK: Tensor, pools: ExpertPools, routing: Routing, keep_rows: int
) -> tuple[Tensor, Tensor]:
    """Output [T, D] of all routed experts, and the pre-activations H [keep_rows, G] of the first rows."""
    with torch.cuda.device_of(x_TD):  # Triton launches on the current device, which need not be that of x
        h_XG = x_TD.new_empty(keep_rows, pools.gate_up_size)
        a_NF = x_TD.new_empty(routing.num_rows, pools.intermediate_size)
        kept = h_XG if keep_rows else None
        for part in parts(pools, routing, "gate_up"):
            here = part.routing
            up_gemm(
                x_TD, here.token_N, part.pools, here.offsets_E1, here.num_trained, kept, a_NF, part.rows_per_expert
            )  # fmt: skip
        y_ND = x_TD.new_empty(routing.num_rows, pools.hidden_size)
        for part in parts(pools, routing, "down"):
            trained, frozen, here = part.pools.trained, part.pools.frozen, part.routing
            grouped_gemm(
                a_NF, here.slot_N, trained.down_EDF[: here.num_trained], stack(frozen, "down"), here.offsets_E1,
                weights_TK, (trained.down_bias_ED, frozen.down_bias_ED),
                out_NO=y_ND, rows_per_expert=part.rows_per_expert,
            )  # fmt: skip
        return _by_token(y_ND, routing), h_XG


def rebuild(x_TD: Tensor, h_prefix: Tensor, pools: ExpertPools, routing: Routing) -> Tensor:
    """H of all rows, [N, G], from that of the prefix."""
    with torch.cuda.device_of(x_TD):
        h_NG = x_TD.new_empty(routing.num_rows, pools.gate_up_size)
        h_NG[: h_prefix.shape[0]] = h_prefix
        if pools.num_experts > pools.num_trained:
            for part in parts(pools, routing, "gate_up", first=routing.num_trained):
                offsets_P1 = part.routing.offsets_E1
                up_gemm(x_TD, routing.token_N, part.pools, offsets_P1, 0, h_NG, None, part.rows_per_expert)
        return h_NG


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
    with torch.cuda.device_of(x_TD):
        trained, offsets_S1 = pools.trained, routing.offsets_E1[: routing.num_trained + 1]
        token_N, slot_N, paired = routing.token_N, routing.slot_N, _paired(pools)
        results = (None, None, None)
        for number, part in enumerate(islice(parts(pools, routing, "down"), None if needs.all_rows else 1)):
            results = grad_gemm(
                grad_out_TD, h_NG, weights_TK, part.pools, part.routing, needs,
                results if number else None, part.rows_per_expert,
            )  # fmt: skip
        grad_h_NG, weighted_a_NF, sums_NX = results

        grad_x_TD = grad_weights_TK = grads = None
        if sums_NX is not None:
            biases_N = bias_dot(grad_out_TD, pools, routing) if trained.down_bias_ED is not None else None
            tables = routing.row_TK, routing.offsets_E1
            grad_weights_TK = combine_sums(sums_NX, *tables, weights_TK.dtype, biases_N)
        if weighted_a_NF is not None:
            assert grad_h_NG is not None
            biased = trained.down_bias_ED is not None
            grads = ExpertWeights(
                grouped_wgrad(grad_h_NG, x_TD, trained.gate_up_EGD, offsets_S1, rows_index_N=token_N, paired=paired),
                grouped_wgrad(grad_out_TD, weighted_a_NF, trained.down_EDF, offsets_S1, grad_index_N=token_N),
                bias_grad(grad_h_NG, offsets_S1, paired=paired) if biased else None,
                bias_grad(grad_out_TD, offsets_S1, token_N, weights_TK, slot_N) if biased else None,
            )
            del weighted_a_NF
        if needs.x:
            assert grad_h_NG is not None
            grad_rows_ND = x_TD.new_empty(routing.num_rows, pools.hidden_size)
            for part in parts(pools, routing, "gate_up"):
                here = part.routing
                grouped_gemm(
                    grad_h_NG, slot_N, part.pools.trained.gate_up_EGD[: here.num_trained].mT,
                    stack(part.pools.frozen, "gate_up").mT, here.offsets_E1, paired=paired,
                    out_NO=grad_rows_ND, rows_per_expert=part.rows_per_expert,
                )  # fmt: skip
            grad_x_TD = _by_token(grad_rows_ND, routing)
        return Gradients(grad_x_TD, grad_weights_TK, grads)

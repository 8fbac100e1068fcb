"""``"esft"`` as an experts backend of transformers: ``model.set_experts_implementation("esft")``.

For models that are not swapped: inference, and training of all experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from esft.experts import stock_layout  # not what is in it: that may be what imports transformers, and so this
from esft.experts.plain_experts import plain_mlp
from esft.transformers_internals import ALL_EXPERTS_FUNCTIONS, is_expert_parallel
from esft_kernels.compiled_op import routed_mlp
from esft_kernels.pools import ExpertPools, ExpertWeights

NAME = "esft"


def experts_forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What transformers calls in the place of an experts module's forward; ``self`` is that module.

    [T, D], expert ids [T, K], routing weights [T, K] -> [T, D]. On one rank of an expert-parallel model, ids of E and
    above are another rank's experts: such slots add nothing and get no gradient.
    """
    _keep_layout(self)
    layout: Any = self.esft_layout
    weights = layout.weights(self)
    nothing = ExpertWeights(*(None if t is None else t[:0].detach() for t in weights.tensors()))
    trains = any(t is not None and t.requires_grad for t in weights.tensors())
    pools = ExpertPools(
        *((weights, nothing) if trains else (nothing, weights)), layout.activation or ExpertPools.activation,
        layout.interleaved,
    )  # fmt: skip
    x_TD = hidden_states.to(weights.gate_up_EGD.dtype)
    if layout.is_fused:
        in_order = torch.arange(pools.num_experts, device=x_TD.device)
        out_TD = routed_mlp(x_TD, top_k_index, top_k_weights, in_order, pools, elsewhere=is_expert_parallel(self))
    else:
        out_TD = plain_mlp(x_TD, top_k_index, top_k_weights, pools, layout.gate, layout.norm)
    return out_TD.to(hidden_states.dtype)


@torch.compiler.assume_constant_result  # so that torch.compile runs it while it traces, and does not look in
def _keep_layout(stock: nn.Module) -> None:
    """Read the module's layout the first time, and keep it there."""
    if "esft_layout" not in vars(stock):
        stock.esft_layout = stock_layout.read_layout(stock, type(stock).__name__)


ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)

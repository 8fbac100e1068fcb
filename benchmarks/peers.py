"""One MoE layer as others compute it: transformers' experts backends, LoRA through PEFT, and one module per expert.

All peers of a run share one set of weights, inputs and routing. A step is forward and backward, and returns the output
and the gradient of the input, so that it can be checked before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn
from transformers import DeepseekV2Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Experts

from benchmarks.shapes import LayerShape
from esft_kernels.compiled_op import routed_mlp
from esft_kernels.pools import PLAIN, ExpertPools, ExpertWeights, dequantize, quantize, split_pools
from esft_kernels.routing import expert_order


@dataclass(frozen=True)
class Problem:
    """A layer's weights by expert id, one batch, and which experts are chosen."""

    shape: LayerShape
    x_TD: Tensor
    index_TK: Tensor
    weights_TK: Tensor
    grad_out_TD: Tensor
    gate_up_EGD: Tensor
    down_EDF: Tensor
    biases: tuple[Tensor, Tensor] | tuple[()]
    chosen: list[int]

    def to(self, dtype: torch.dtype) -> Problem:
        """The same values in another dtype; routing weights stay in float32."""
        names = ("x_TD", "grad_out_TD", "gate_up_EGD", "down_EDF")
        return replace(
            self,
            **{name: getattr(self, name).to(dtype) for name in names},
            biases=tuple(bias.to(dtype) for bias in self.biases),
        )

    @property
    def chosen_rows(self) -> int:
        return int(torch.isin(self.index_TK, torch.tensor(self.chosen, device=self.index_TK.device)).sum())


@dataclass(frozen=True)
class Step:
    """``forward`` gives the output from inputs that need gradients; ``trained`` are the weights that get them too."""

    forward: Callable[[Tensor, Tensor], Tensor]
    trained: list[Tensor]

    def run(self, problem: Problem) -> list[Tensor]:
        """Output, and gradients of x, the routing weights, and everything trained."""
        x, weights = problem.x_TD.detach().requires_grad_(), problem.weights_TK.detach().requires_grad_()
        out = self.forward(x, weights)
        return [out.detach(), *torch.autograd.grad(out, [x, weights, *self.trained], problem.grad_out_TD)]

    def saved_bytes(self, problem: Problem) -> int:
        """Bytes that autograd keeps from the forward to the backward, beside the weights; each storage once."""
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        x, weights = problem.x_TD.detach().requires_grad_(), problem.weights_TK.detach().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = self.forward(x, weights)
        stay = (problem.gate_up_EGD, problem.down_EDF, *self.trained)
        weights_at = {t.untyped_storage().data_ptr() for t in stay} | self.pool_storages()
        del out
        return sum(size for pointer, size in sizes.items() if pointer not in weights_at)

    def pool_storages(self) -> set[int]:
        return set()


@dataclass(frozen=True)
class PoolStep(Step):
    pools: ExpertPools

    def pool_storages(self) -> set[int]:
        tensors = (*self.pools.trained.tensors(), *self.pools.frozen.tensors())
        return {t.untyped_storage().data_ptr() for t in tensors if t is not None}


def ours(problem: Problem, trained: list[int], backend: str, frozen: str = PLAIN) -> PoolStep:
    """This project's experts with ``trained`` of them trained, and the others in a format where one is named."""
    shape, s = problem.shape, len(trained)
    gate_up, down = problem.gate_up_EGD, problem.down_EDF
    if shape.gpt_oss_layout:  # stored as [E, D, G] and [E, F, D]
        gate_up, down = gate_up.mT.contiguous().mT, down.mT.contiguous().mT
    weights = ExpertWeights(gate_up, down, *problem.biases)
    pools = split_pools(weights, trained, shape.activation, shape.gpt_oss_layout)
    for tensor in pools.trained.tensors() if s else ():
        if tensor is not None:
            tensor.requires_grad_()
    if isinstance(pools.frozen, ExpertWeights) and frozen != PLAIN:
        pools = replace(pools, frozen=quantize(pools.frozen, frozen))
    return _of_pools(problem, trained, pools, backend)


def decoded(problem: Problem, trained: list[int], step: PoolStep, backend: str) -> PoolStep:
    """The same step with the frozen experts written out, where they are in a format."""
    frozen = step.pools.frozen
    if isinstance(frozen, ExpertWeights):
        return step
    plain = replace(step.pools, frozen=dequantize(frozen, problem.x_TD.dtype))
    return _of_pools(problem, trained, plain, backend)


def _of_pools(problem: Problem, trained: list[int], pools: ExpertPools, backend: str) -> PoolStep:
    position = torch.argsort(torch.tensor(expert_order(trained, pools.num_experts))).to(problem.x_TD.device)

    def forward(x: Tensor, weights: Tensor) -> Tensor:
        return routed_mlp(x, problem.index_TK, weights, position, pools, backend)

    return PoolStep(forward, [t for t in pools.trained.tensors() if t is not None and t.requires_grad], pools)


def mixed(problem: Problem, adapters: int, backend: str) -> PoolStep:
    """Our step of as many adapters in one batch, a share of the tokens for each: all have experts of their own, which
    are copies, so that the results are those of one."""
    trained, tokens = problem.chosen, len(problem.x_TD)
    one, base = ours(problem, trained, backend).pools, ours(problem, [], backend).pools
    stacks = (None if t is None else t.detach().repeat(adapters, *[1] * (t.dim() - 1)) for t in one.trained.tensors())
    pools = replace(base, trained=ExpertWeights(*(None if t is None else t.requires_grad_() for t in stacks)))
    device, s = problem.x_TD.device, len(trained)
    position = (torch.arange(base.num_experts, device=device) + adapters * s).repeat(adapters, 1)
    position[:, trained] = torch.arange(adapters * s, device=device).view(adapters, s)
    adapter_T = torch.arange(tokens, device=device) * adapters // max(tokens, 1)

    def forward(x: Tensor, weights: Tensor) -> Tensor:
        return routed_mlp(x, problem.index_TK, weights, position, pools, backend, adapter_T=adapter_T)

    return PoolStep(forward, [t for t in pools.trained.tensors() if t is not None], pools)


def _stock_experts(problem: Problem, implementation: str, trains: bool) -> DeepseekV2Experts:
    """transformers' stacked experts of this layer; the weights are the problem's own, not copies."""
    shape = problem.shape
    config = DeepseekV2Config(
        hidden_size=shape.hidden, moe_intermediate_size=shape.intermediate, n_routed_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
    )  # fmt: skip
    config._experts_implementation = implementation
    with torch.device("meta"):
        experts = DeepseekV2Experts(config)
    experts.gate_up_proj = nn.Parameter(problem.gate_up_EGD, requires_grad=trains)
    experts.down_proj = nn.Parameter(problem.down_EDF, requires_grad=trains)
    return experts


def stock(problem: Problem, implementation: str, trains: bool) -> Step:
    """transformers' experts, all trained or all frozen: a stacked tensor knows nothing between."""
    experts = _stock_experts(problem, implementation, trains)

    def forward(x: Tensor, weights: Tensor) -> Tensor:
        return experts(x, problem.index_TK, weights)

    return Step(forward, [experts.gate_up_proj, experts.down_proj] if trains else [])


def lora(problem: Problem, rank: int = 8) -> Step:
    """LoRA on the stacked experts through PEFT's ``target_parameters``."""
    from peft import LoraConfig, get_peft_model

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = _stock_experts(problem, "grouped_mm", False)

        def forward(self, x: Tensor, weights: Tensor) -> Tensor:
            return self.experts(x, problem.index_TK, weights)

    targets = ["experts.gate_up_proj", "experts.down_proj"]
    layer = get_peft_model(Layer(), LoraConfig(r=rank, lora_alpha=2 * rank, target_parameters=targets))
    return Step(layer, [p for p in layer.parameters() if p.requires_grad])


class _OneExpert(nn.Module):
    def __init__(self, gate_up_GD: Tensor, down_DF: Tensor, trains: bool):
        super().__init__()
        gate, up = gate_up_GD.chunk(2)
        self.gate, self.up, self.down = (nn.Parameter(t, requires_grad=trains) for t in (gate, up, down_DF))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.silu(F.linear(x, self.gate)) * F.linear(x, self.up), self.down)


def per_expert(problem: Problem) -> Step:
    """One module per expert, its tokens picked by a boolean mask over all slots: how ESFT was first published."""
    chosen = set(problem.chosen)
    experts = nn.ModuleList(
        _OneExpert(gate_up, down, e in chosen)
        for e, (gate_up, down) in enumerate(zip(problem.gate_up_EGD, problem.down_EDF, strict=True))
    )
    slots, top_k = problem.index_TK.flatten(), problem.shape.top_k

    def forward(x: Tensor, weights: Tensor) -> Tensor:
        every = repeat(x, "token d -> (token k) d", k=top_k)
        out = torch.empty_like(every)
        for e, expert in enumerate(experts):
            mask = slots == e
            out[mask] = expert(every[mask])
        out = (rearrange(out, "(token k) d -> token k d", k=top_k) * weights[..., None]).sum(dim=1)
        return out.to(x.dtype)

    return Step(forward, [p for p in experts.parameters() if p.requires_grad])


def dense_limit(problem: Problem) -> Callable[[], None]:
    """The same matrix FLOPs as dense products of all rows at once, into buffers that exist: what the machine can do."""
    d, f, g = problem.shape.hidden, problem.shape.intermediate, 2 * problem.shape.intermediate
    n, chosen = problem.index_TK.numel(), problem.chosen_rows
    x, h, a = (problem.x_TD.new_ones(n, width) * 0.01 for width in (d, g, f))
    gate_up, down = problem.gate_up_EGD[0], problem.down_EDF[0]
    rows_d, rows_g, rows_f = torch.empty_like(x), torch.empty_like(h), torch.empty_like(a)
    grad_up, grad_down = torch.empty_like(gate_up), torch.empty_like(down)

    def step() -> None:
        torch.mm(x, gate_up.T, out=rows_g)
        torch.mm(a, down.T, out=rows_d)
        torch.mm(x, down, out=rows_f)
        torch.mm(h, gate_up, out=rows_d)
        torch.mm(h[:chosen].T, x[:chosen], out=grad_up)
        torch.mm(x[:chosen].T, a[:chosen], out=grad_down)

    return step

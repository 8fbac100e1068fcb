"""Where a model keeps its experts. What differs between model families is data here, or read off the modules."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from esft.errors import InputError
from esft.experts.pooled_experts import Experts
from esft.experts.stock_layout import is_stacked, stacked_weights
from esft.parallel.join import job_of
from esft.parallel.ranks import ALONE, Ranks
from esft.parallel.sharding import is_cut_up
from esft.transformers_internals import is_transposed, number_of_experts

# What a MoE block calls its router and its shared experts.
ROUTERS = ("gate", "router", "wg", "moe_gate")
SHARED = ("shared_experts", "shared_expert", "shared_expert_gate", "shared_mlp", "share_expert")

# Model types whose gate function (``esft.scoring.routers.GATES``) does not show in the routing weights: they hold a
# scale for each expert, are made one expert at a time (arXiv 2310.00811), or are one a token.
GATE = {
    "diffusion_gemma_text": "probabilities",
    "gemma4_text": "probabilities",
    "phimoe": "softmax",
    "zaya": "softmax",
}

_LAYER = re.compile(r"(?:^|\.)(\d+)(?=\.)")


@dataclass(frozen=True)
class MoELayer:
    """One MoE layer of a model: its index, the module path of its experts, and the modules themselves."""

    index: int
    name: str
    block: nn.Module  # holds experts and router
    experts: nn.Module  # stacked experts, ``Experts`` in a swapped model, or a ModuleList
    parent: nn.Module  # of the block: some families keep the shared experts there

    @property
    def attribute(self) -> str:
        return self.name.rpartition(".")[2]

    @property
    def num_experts(self) -> int:
        return len(self.experts) if isinstance(self.experts, nn.ModuleList) else number_of_experts(self.experts)

    @property
    def transposed(self) -> bool:
        """Whether the experts' weights are [in, out]."""
        return self.experts.transposed if isinstance(self.experts, Experts) else is_transposed(self.experts)

    def weights(self, expert: int) -> dict[str, Tensor]:
        """Detached views of one expert's weights, by the names of the stock model's parameters.

        Raises InputError for experts that ``swap`` did not put in, of which no names are known.
        """
        if isinstance(self.experts, nn.ModuleList):
            return {name: p.detach() for name, p in self.experts[expert].named_parameters(f"{self.name}.{expert}")}
        if isinstance(self.experts, Experts):
            if not self.experts.stock_names:
                raise InputError(f"{self.name}: swapped by hand, so the checkpoint's names are not known")
            names, weights = self.experts.stock_names, self.experts.weights_of(expert)
            return {f"{self.name}.{name}": weight for name, weight in zip(names, weights, strict=True)}
        stacked = stacked_weights(self.experts, self.name)
        return {f"{self.name}.{name}": weight.detach()[expert] for name, weight in stacked.items()}

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Those that belong to one routed expert or another; a norm that all share is none of them."""
        return [p for name, p in self.experts.named_parameters() if not name.startswith("post_expert_norm.")]

    def trained_parameters(self, experts: list[int]) -> list[nn.Parameter]:
        """Of a swapped layer, the parameters of these experts: the trained pool, or the experts of a ModuleList."""
        if isinstance(self.experts, nn.ModuleList):
            return [p for e in experts for p in self.experts[e].parameters()]
        return [p for name, p in self.experts.named_parameters() if experts and name.startswith("trained_")]

    @property
    def router(self) -> nn.Module:
        for name in ROUTERS:
            if isinstance(module := getattr(self.block, name, None), nn.Module):
                return module
        raise InputError(f"layer {self.index}: no router beside {self.name}")

    @property
    def shared_experts(self) -> list[nn.Module]:
        holders = (self.block, self.parent)
        return [m for at in holders for name in SHARED if isinstance(m := getattr(at, name, None), nn.Module)]


def moe_layers(model: nn.Module) -> list[MoELayer]:
    """All MoE layers in order of their index, of a stock or a swapped model.

    A layer's index is its number in the module path. Where two groups of experts share a number (a model of two towers,
    or experts of text beside experts of images), all are numbered by their place in the model instead.

    Raises InputError for a model without any.
    """
    modules, found = dict(model.named_modules()), []
    for name, module in modules.items():
        number = _LAYER.findall(name)
        if number and (is_stacked(module) or isinstance(module, Experts) or _is_list(name, module)):
            block = name.rpartition(".")[0]
            parent = modules[block.rpartition(".")[0]]
            found.append((int(number[0]), name, modules[block], module, parent))
    if not found:
        raise InputError(f"{type(model).__name__} has no MoE layers with stacked experts")
    if max(Counter(index for index, *_ in found).values()) > 1:
        found = [(place, *rest) for place, (_, *rest) in enumerate(found)]
    return sorted((MoELayer(*layer) for layer in found), key=lambda layer: layer.index)


def is_dealt(model: nn.Module) -> bool:
    """Whether other ranks hold some of a swapped model's experts."""
    return any(isinstance(module, Experts) and module.deal is not None for module in model.modules())


def is_apart(model: nn.Module) -> bool:
    """Whether this rank has only a part of some weights: dealt experts, or what FSDP2 has cut up."""
    return bool(_spread(model))


def ranks_of(model: nn.Module) -> Ranks:
    """The job over which a model's weights are spread; one process where this one has all of them.

    Raises RankError outside of that job.
    """
    return job_of(max(sizes)) if (sizes := _spread(model)) else ALONE


def _spread(model: nn.Module) -> list[int]:
    """Over how many processes each of the parts is spread that are."""
    dealt = [len(m.deal.sizes) for m in model.modules() if isinstance(m, Experts) and m.deal is not None]
    return dealt + [p.device_mesh.size() for p in model.parameters() if is_cut_up(p)]  # pyright: ignore[reportAttributeAccessIssue]


def dealt_pools(model: nn.Module) -> set[nn.Parameter]:
    """The parameters of experts that are dealt out, trained and frozen."""
    dealt = [m for m in model.modules() if isinstance(m, Experts) and m.deal is not None]
    return {p for module in dealt for p in module.parameters(recurse=False)}


def dealt_parameters(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The trained pools of which every rank has a part: name -> rows of each rank, one after the other the whole."""
    return {
        f"{path}.{name}": module.deal.sizes
        for path, module in model.named_modules()
        if isinstance(module, Experts) and module.deal is not None and any(module.deal.sizes)
        for name, _ in module.named_parameters(recurse=False)
        if name.startswith("trained_")
    }


def _is_list(name: str, module: nn.Module) -> bool:
    """Whether a module is a list of experts of one shape, as in older code."""
    if not isinstance(module, nn.ModuleList) or not name.endswith(".experts") or len(module) < 2:
        return False
    shapes = [[(n, p.shape) for n, p in expert.named_parameters()] for expert in module]
    return bool(shapes[0]) and all(shape == shapes[0] for shape in shapes)


@dataclass(frozen=True)
class ExpertStack:
    """The routed experts of one layer, as the stock model has them.

    Attributes:
        num_experts: how many.
        weights: one expert's, by its id: detached views by the names of the stock model's parameters, in the order of
            ``PROJECTIONS`` where they are stacked.
        stacked: whether those parameters hold all experts; else each expert is a module of its own.
        transposed: whether the weights are [in, out].
    """

    num_experts: int
    weights: Callable[[int], dict[str, Tensor]]
    stacked: bool
    transposed: bool


@dataclass(frozen=True)
class StockWeights:
    """All weights of a stock or a swapped model, detached, by the names that the stock model has for them.

    Attributes:
        experts: by layer index.
        shared: those of shared experts.
        others: all that is left.
    """

    experts: dict[int, ExpertStack]
    shared: dict[str, Tensor]
    others: dict[str, Tensor]

    @property
    def num_experts(self) -> dict[int, int]:
        return {layer: stack.num_experts for layer, stack in self.experts.items()}


def stock_weights(model: nn.Module) -> StockWeights:
    """Raises InputError for a model without MoE layers, and for experts that are not supported."""
    layers = moe_layers(model)
    experts = {
        layer.index: ExpertStack(
            layer.num_experts, layer.weights, not isinstance(layer.experts, nn.ModuleList), layer.transposed
        )
        for layer in layers
    }
    routed = {p for layer in layers for p in layer.parameters}
    shared = {p for layer in layers for module in layer.shared_experts for p in module.parameters()}
    rest = {name: p for name, p in model.named_parameters() if p not in routed}
    return StockWeights(
        experts,
        {name: p.detach() for name, p in rest.items() if p in shared},
        {name: p.detach() for name, p in rest.items() if p not in shared},
    )

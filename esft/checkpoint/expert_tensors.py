"""How a checkpoint stores a model's experts: names and layouts, as transformers' own conversion makes them.

transformers loads per-expert tensors into stacked parameters, and turns them back on saving. What that does to one
expert is found by letting it convert tensors of element numbers: where a number comes out tells which slice went where.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from esft.checkpoint.original_format import to_stored
from esft.errors import InputError
from esft.experts.experts import Experts
from esft.experts.model_state import known_state, once_per_model
from esft.experts.moe_layers import MoELayer, moe_layers
from esft.experts.stock_layout import read_layout

# The probes' sizes: two gates, two ups, three hidden. Different, so that no two layouts give the same numbers.
_F, _D = 2, 3

_PARTS = {
    "whole": lambda x: x,
    "first half": lambda x: x.chunk(2)[0],
    "second half": lambda x: x.chunk(2)[1],
    "in turn": lambda x: x.unflatten(0, (2, -1)).transpose(0, 1),  # the halves' rows, one of each after the other
}


@dataclass(frozen=True)
class ExpertTensor:
    """A tensor of one expert in an adapter.

    Attributes:
        name: the checkpoint's own where it stores experts one by one. Where it stacks them, the stacked tensor's with
            the expert's number in it; the tensor is then that expert's slice.
        stored_name: the checkpoint's tensor.
        stacked: whether that one holds all experts, along its first dimension.
        projection: which of the expert's weights it is a part of, by place in ``esft.experts.experts.PROJECTIONS``.
        part, transposed: which part.
    """

    layer: int
    expert: int
    name: str
    stored_name: str
    stacked: bool
    projection: int
    part: str
    transposed: bool

    def read(self, weight: Tensor) -> Tensor:
        """The stored tensor, from the expert's weight as the model lays it out; a view where that can be."""
        view = self._view(weight)
        return view.flatten(0, 1) if self.part == "in turn" else view

    def write(self, weight: Tensor, value: Tensor) -> None:
        """Put a stored tensor back into the expert's weight."""
        view = self._view(weight)
        view.copy_(value.reshape(view.shape))

    def _view(self, weight: Tensor) -> Tensor:
        return _PARTS[self.part](weight.mT if self.transposed else weight)


@once_per_model
def expert_tensors(model: PreTrainedModel) -> list[ExpertTensor]:
    """What a checkpoint of this model, stock or swapped, holds of each routed expert.

    Found once and kept on the model, as it takes seconds for thousands of experts. Raises InputError for a checkpoint
    layout in which an expert has no slice of its own.
    """
    found, probes = [], {}
    layers = moe_layers(model)
    owners: list[tuple[MoELayer, int]] = []
    for layer in layers:
        if isinstance(layer.experts, nn.ModuleList):
            found += _listed(layer)
            continue
        names, transposed = stock_names(model, layer)
        for projection, name in enumerate(names):
            probes[f"{layer.name}.{name}"] = _probe(layer.num_experts, names[0], projection, transposed, len(owners))
            owners.append((layer, projection))
    by_owner: list[dict[str, Tensor]] = [{} for _ in owners]
    for name, numbers in to_stored(model, probes).items():
        by_owner[int(numbers.flatten()[0]) // _OWNER][name] = numbers
    for (layer, projection), probe, stored in zip(owners, probes.values(), by_owner, strict=True):
        for name, numbers in stored.items():
            found += _located(layer, projection, probe, name, numbers)
    return found


_OWNER = 1 << 32  # element numbers of one parameter


def stock_names(model: nn.Module, layer: MoELayer) -> tuple[tuple[str, ...], bool]:
    """The stock module's parameter names of a layer's experts, and whether they are transposed."""
    swapped = known_state(model).swapped
    if isinstance(layer.experts, Experts) and swapped is None:
        raise InputError(f"{layer.name}: swapped by hand, so the checkpoint's names are not known")
    layout = swapped.layouts[layer.name] if swapped is not None else read_layout(layer.experts, layer.name)
    return layout.names, layout.transposed


def _probe(num_experts: int, first: str, projection: int, transposed: bool, owner: int) -> Tensor:
    g = 2 * _F if first == "gate_up_proj" else _F
    shape = [(g, _D), (_D, _F), (g,), (_D,)][projection]
    shape = (num_experts, *(reversed(shape) if transposed else shape))
    return torch.arange(torch.Size(shape).numel()).view(shape) + owner * _OWNER


def _located(layer: MoELayer, projection: int, probe: Tensor, name: str, numbers: Tensor) -> Iterator[ExpertTensor]:
    size = probe[0].numel()
    experts = (numbers - probe.flatten()[0]).div(size, rounding_mode="floor")
    if bool((experts == experts.flatten()[0]).all()) and numbers.dim() == probe.dim() - 1:
        slices = [(int(experts.flatten()[0]), name, numbers)]
        stacked = False
    elif numbers.dim() == probe.dim() and numbers.shape[0] == layer.num_experts:
        slices = [(e, slice_name(name, e), numbers[e]) for e in range(layer.num_experts)]
        stacked = True
    else:
        raise InputError(f"{name}: the checkpoint stores experts in a way that is not supported")
    part = transposed = None
    for expert, own_name, own in slices:
        if part is None or transposed is None:
            part, transposed = _matched(probe[expert], own, name)
        yield ExpertTensor(layer.index, expert, own_name, name, stacked, projection, part, transposed)


def _matched(weight: Tensor, numbers: Tensor, name: str) -> tuple[str, bool]:
    for transposed, part in product((False, True) if weight.dim() == 2 else (False,), _PARTS):
        x = weight.mT if transposed else weight
        if part != "whole" and x.shape[0] % 2:
            continue
        if torch.equal(_PARTS[part](x).reshape(-1, *x.shape[1:]), numbers):
            return part, transposed
    raise InputError(f"{name}: the checkpoint stores experts in a way that is not supported")


def slice_name(stacked: str, expert: int) -> str:
    """An adapter's name for one expert's slice of a stacked tensor: the number comes where one-by-one names have it."""
    head, found, tail = stacked.rpartition("experts.")
    if found:
        return f"{head}{found}{expert}.{tail}"
    module, _, last = re.sub(r"\.weight$", "", stacked).rpartition(".")
    return f"{module}.{expert}.{last}" + (".weight" if stacked.endswith(".weight") else "")


def _listed(layer: MoELayer) -> Iterator[ExpertTensor]:
    """Of experts that are modules of their own: under the model's names, which older code shares with its files."""
    for expert, module in enumerate(layer.experts):
        for place, (name, _) in enumerate(module.named_parameters()):
            own = f"{layer.name}.{expert}.{name}"
            yield ExpertTensor(layer.index, expert, own, own, False, place, "whole", False)


def expert_weights(
    model: nn.Module, layer: MoELayer, experts: Iterable[int]
) -> dict[int, list[tuple[Tensor, str, int | None]]]:
    """Of each of these experts its weights, in the order of its projections.

    A weight is a detached view, and comes with the parameter of the stock model and which slice of that it is.
    """
    module = layer.experts
    if isinstance(module, nn.ModuleList):
        return {
            e: [(p.detach(), f"{layer.name}.{e}.{name}", None) for name, p in module[e].named_parameters()]
            for e in experts
        }
    names, _ = stock_names(model, layer)
    found = {}
    for e in experts:
        weights = (
            module.weights_of(e) if isinstance(module, Experts) else [getattr(module, n).detach()[e] for n in names]
        )
        found[e] = [(weight, f"{layer.name}.{name}", e) for name, weight in zip(names, weights, strict=True)]
    return found

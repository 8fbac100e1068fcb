"""How a checkpoint stores a model's weights: names, slices and layouts, as transformers' own conversion makes them.

transformers stacks, fuses, splits and renames tensors when it loads a checkpoint, and turns that back when it saves.
What that does to one weight is found by letting it convert tensors of element numbers: where a number comes out tells
which element went where.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from esft.checkpoint.original_format import by_layer, to_stored
from esft.checkpoint.views import ROWS, WHOLE, Link, Part, StoredTensor, strided
from esft.errors import InputError
from esft.experts.model_state import once_per_model
from esft.experts.moe_layers import MoELayer, moe_layers

# The probes' sizes: two gates, two ups, three hidden. Different, so that no two layouts give the same numbers.
_F, _D = 2, 3
_OWNER = 1 << 32  # element numbers of one parameter

ExpertTensors = dict[tuple[int, int], dict[str, StoredTensor]]


@once_per_model
def expert_tensors(model: PreTrainedModel) -> ExpertTensors:
    """Of each routed expert, by (layer, expert), what a checkpoint holds of it, by the names in an adapter.

    Those are the checkpoint's own where it stores experts one by one. Where it stacks them, they are the stacked
    tensor's with the expert's number in it. The model is a stock or a swapped one. Found once and kept on it, as it
    takes seconds for thousands of experts. Raises InputError for a checkpoint in which an expert has no slice of its
    own.
    """
    found: ExpertTensors = {}
    probes: dict[str, Tensor] = {}
    owners: list[tuple[MoELayer, torch.Size]] = []  # and the shape of one expert's weight
    for layer in moe_layers(model):
        found |= {(layer.index, expert): {} for expert in range(layer.num_experts)}
        if isinstance(layer.experts, nn.ModuleList):
            for expert, module in enumerate(layer.experts):
                found[layer.index, expert] = dict(_listed(f"{layer.name}.{expert}", module))
            continue
        for (name, weight), shape in zip(layer.weights(0).items(), _probe_shapes(layer), strict=False):
            size = torch.Size(shape).numel()
            probes[name] = torch.arange(size).view(shape) + len(owners) * _OWNER
            owners.append((layer, weight.shape))
    by_owner = [{} for _ in owners]
    for name, numbers in to_stored(model, probes).items():
        by_owner[int(numbers.flatten()[0]) // _OWNER][name] = numbers
    for (layer, shape), probe, stored in zip(owners, probes.items(), by_owner, strict=True):
        for name, numbers in stored.items():
            for expert, own, tensor in _located(name, numbers, *probe, torch.empty(shape, device="meta")):
                found[layer.index, expert][own] = tensor
    return found


def _listed(prefix: str, expert: nn.Module) -> Iterator[tuple[str, StoredTensor]]:
    """Of an expert that is a module of its own: under the model's names, which older code shares with its files."""
    for name, parameter in expert.named_parameters(prefix):
        yield name, StoredTensor(name, None, tuple(parameter.shape), (Link(name),))


def _probe_shapes(layer: MoELayer) -> list[tuple[int, ...]]:
    """Of small tensors in the layouts of the stacked parameters, in the order of ``PROJECTIONS``."""
    g = 2 * _F if next(iter(layer.weights(0))).endswith(".gate_up_proj") else _F
    shapes = [(g, _D), (_D, _F), (g,), (_D,)]
    return [(layer.num_experts, *(reversed(shape) if layer.transposed else shape)) for shape in shapes]


def _located(
    stored: str, numbers: Tensor, parameter: str, probe: Tensor, weight: Tensor
) -> Iterator[tuple[int, str, StoredTensor]]:
    """The experts that a stored tensor holds something of: number, name in an adapter, and what it holds."""
    experts = (numbers - probe.flatten()[0]).div(probe[0].numel(), rounding_mode="floor")
    if bool((experts == experts.flatten()[0]).all()) and numbers.dim() == probe.dim() - 1:
        expert = int(experts.flatten()[0])
        slices = [(expert, stored, None)]
        view = _matched(probe[expert], numbers, stored)
    elif numbers.dim() == probe.dim() and numbers.shape[0] == len(probe):
        slices = [(expert, slice_name(stored, expert), expert) for expert in range(len(probe))]
        view = _matched(probe[0], numbers[0], stored)
    else:
        raise InputError(f"{stored}: the checkpoint stores experts in a way that is not supported")
    shape = tuple(view.read(weight).shape)
    for expert, name, index in slices:
        yield expert, name, StoredTensor(stored, index, shape, (Link(parameter, expert, view),))


def _matched(weight: Tensor, numbers: Tensor, stored: str) -> Part:
    for transposed, rows in product((False, True) if weight.dim() == 2 else (False,), ROWS):
        part = Part(rows, transposed)
        if (rows == "all" or weight.shape[-1 if transposed else 0] % 2 == 0) and torch.equal(
            part.read(weight), numbers
        ):
            return part
    raise InputError(f"{stored}: the checkpoint stores experts in a way that is not supported")


def slice_name(stacked: str, expert: int) -> str:
    """An adapter's name for one expert's slice of a stacked tensor: the number comes where one-by-one names have it."""
    head, found, tail = stacked.rpartition("experts.")
    if found:
        return f"{head}{found}{expert}.{tail}"
    module, _, last = re.sub(r"\.weight$", "", stacked).rpartition(".")
    return f"{module}.{expert}.{last}" + (".weight" if stacked.endswith(".weight") else "")


def other_tensors(model: PreTrainedModel, parameters: dict[str, Tensor]) -> dict[str, StoredTensor]:
    """What a checkpoint of this model holds of some parameters, by its own names; none is a routed expert's.

    Each is stored as it is, in pieces, or with others in one tensor. Raises InputError where the checkpoint mixes
    elements in a way that cannot be followed.
    """
    found: dict[str, StoredTensor] = {}
    for names in by_layer(parameters):
        # Without memory first: most tensors are renamed at most, and come out as they went in.
        marks = {name: torch.empty(parameters[name].shape, device="meta") for name in names}
        by_mark = {id(mark): name for name, mark in marks.items()}
        for stored, tensor in to_stored(model, dict(marks)).items():
            if (name := by_mark.pop(id(tensor), None)) is not None:
                found[stored] = StoredTensor(stored, None, tuple(tensor.shape), (Link(name),))
        probes, total = {}, 0
        for name in by_mark.values():
            probes[name] = torch.arange(total, total + marks[name].numel()).view(marks[name].shape)
            total += marks[name].numel()
        for stored, numbers in to_stored(model, dict(probes)).items() if probes else ():
            found[stored] = StoredTensor(stored, None, tuple(numbers.shape), tuple(_links(stored, numbers, probes)))
    return found


def _links(stored: str, numbers: Tensor, probes: dict[str, Tensor]) -> Iterator[Link]:
    flat = numbers.flatten()
    for name, probe in probes.items():
        begin = int(probe.flatten()[0]) if probe.numel() else 0
        at = ((flat >= begin) & (flat < begin + probe.numel())).nonzero().flatten()
        if at.numel():
            alone = at.numel() == flat.numel()
            inside = strided(flat[at] - begin, tuple(numbers.shape) if alone else (at.numel(),))
            outside = WHOLE if alone else strided(at, (at.numel(),))
            if inside is None or outside is None:
                raise InputError(f"{stored}: the checkpoint stores {name} in a way that is not supported")
            yield Link(name, None, inside, outside)

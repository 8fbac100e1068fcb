"""How a checkpoint stores a model's weights: names, slices and layouts, as transformers' own conversion makes them.

transformers stacks, fuses, splits and renames tensors when it loads a checkpoint, and turns that back when it saves.
What that does to one weight is found by letting it convert tensors of element numbers: where a number comes out tells
which element went where.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import accumulate

import torch
from torch import Tensor
from transformers import PreTrainedModel

from esft.checkpoint.original_format import ToStored
from esft.checkpoint.views import WHOLE, Link, StoredTensor, part_that_reads, strided
from esft.errors import InputError
from esft.experts.model_state import once_per_model
from esft.experts.moe_layers import ExpertStack

# The probes' sizes: two gates, two ups, three hidden. Different, so that no two layouts give the same numbers.
_F, _D = 2, 3
_OWNER = 1 << 32  # element numbers of one parameter

ExpertTensors = dict[tuple[int, int], dict[str, StoredTensor]]


@once_per_model
def expert_tensors(model: PreTrainedModel, experts: dict[int, ExpertStack], to_stored: ToStored) -> ExpertTensors:
    """Of each routed expert, by (layer, expert), what a checkpoint holds of it, by the names in an adapter.

    Those are the checkpoint's own where it stores experts one by one. Where it stacks them, they are the stacked
    tensor's with the expert's number in it. Found once and kept on the model, as it takes seconds for thousands of
    experts. Raises InputError for a checkpoint in which an expert has no slice of its own.

    Args:
        model: stock or swapped.
        experts: those of ``stock_weights(model)``.
        to_stored: ``original_format(model)``.
    """
    found: ExpertTensors = {(layer, e): {} for layer, stack in experts.items() for e in range(stack.num_experts)}
    probes: dict[str, Tensor] = {}
    owners: list[tuple[int, Tensor]] = []  # of each probe: the layer, and one expert's weight
    for layer, stack in experts.items():
        for expert in range(0 if stack.stacked else stack.num_experts):
            # Under the model's names, which older code shares with its files.
            weights = stack.weights(expert).items()
            found[layer, expert] = {n: StoredTensor(n, None, tuple(w.shape), (Link(n),)) for n, w in weights}
        for name, shape in _probe_shapes(stack).items() if stack.stacked else ():
            probes[name] = torch.arange(shape.numel()).view(shape) + len(owners) * _OWNER
            owners.append((layer, stack.weights(0)[name]))
    by_owner = [{} for _ in owners]
    for name, numbers in to_stored(probes, probes.__getitem__):
        by_owner[int(numbers.flatten()[0]) // _OWNER][name] = numbers
    for (layer, weight), probe, stored in zip(owners, probes.items(), by_owner, strict=True):
        for name, numbers in stored.items():
            for expert, own, tensor in _located(name, numbers, *probe, weight):
                found[layer, expert][own] = tensor
    return found


def _probe_shapes(stack: ExpertStack) -> dict[str, torch.Size]:
    """Of small tensors in the layouts of the stacked parameters, by their names."""
    names = list(stack.weights(0))
    g = 2 * _F if names[0].endswith(".gate_up_proj") else _F
    shapes = zip(names, [(g, _D), (_D, _F), (g,), (_D,)], strict=False)
    return {name: torch.Size((stack.num_experts, *(s[::-1] if stack.transposed else s))) for name, s in shapes}


def _located(
    stored: str, numbers: Tensor, parameter: str, probe: Tensor, weight: Tensor
) -> Iterator[tuple[int, str, StoredTensor]]:
    """The experts that a stored tensor holds something of: number, name in an adapter, and what it holds."""
    experts = (numbers - probe.flatten()[0]).div(probe[0].numel(), rounding_mode="floor")
    first = int(experts.flatten()[0])
    if bool((experts == first).all()) and numbers.dim() == probe.dim() - 1:
        slices, own = [(first, stored, None)], numbers
    elif numbers.dim() == probe.dim() and numbers.shape[0] == len(probe):
        slices, own = [(e, slice_name(stored, e), e) for e in range(len(probe))], numbers[0]
        first = 0
    else:
        raise InputError(f"{stored}: the checkpoint stores experts in a way that is not supported")
    view = part_that_reads(probe[first], own)
    if view is None:
        raise InputError(f"{stored}: the checkpoint stores experts in a way that is not supported")
    shape = tuple(view.read(weight).shape)
    for expert, name, index in slices:
        yield expert, name, StoredTensor(stored, index, shape, (Link(parameter, expert, view),))


def slice_name(stacked: str, expert: int) -> str:
    """An adapter's name for one expert's slice of a stacked tensor: the number comes where one-by-one names have it."""
    head, found, tail = stacked.rpartition("experts.")
    if found:
        return f"{head}{found}{expert}.{tail}"
    module, _, last = re.sub(r"\.weight$", "", stacked).rpartition(".")
    return f"{module}.{expert}.{last}" + (".weight" if stacked.endswith(".weight") else "")


def other_tensors(to_stored: ToStored, parameters: dict[str, Tensor]) -> dict[str, StoredTensor]:
    """What a checkpoint holds of some of a model's parameters, by its own names; none is a routed expert's.

    Each is stored as it is, in pieces, or with others in one tensor. Raises InputError where the checkpoint mixes
    elements in a way that cannot be followed.
    """
    # Without memory first: most tensors are renamed at most, and come out as they went in.
    marks = {name: torch.empty(parameter.shape, device="meta") for name, parameter in parameters.items()}
    by_mark = {id(mark): name for name, mark in marks.items()}
    found: dict[str, StoredTensor] = {}
    for stored, tensor in to_stored(parameters, marks.__getitem__):
        if (name := by_mark.pop(id(tensor), None)) is not None:
            found[stored] = StoredTensor(stored, None, tuple(tensor.shape), (Link(name),))
    changed = list(by_mark.values())
    sizes = [marks[name].numel() for name in changed]
    begins = dict(zip(changed, accumulate(sizes, initial=0), strict=False))  # the first number of each

    def probe(name: str) -> Tensor:
        return torch.arange(begins[name], begins[name] + marks[name].numel()).view(marks[name].shape)

    for stored, numbers in to_stored(changed, probe):
        found[stored] = StoredTensor(stored, None, tuple(numbers.shape), tuple(_links(stored, numbers, begins)))
    return found


def _links(stored: str, numbers: Tensor, begins: dict[str, int]) -> Iterator[Link]:
    names, flat = list(begins), numbers.flatten()
    owners = torch.bucketize(flat, torch.tensor(list(begins.values())), right=True) - 1
    for owner in owners.unique().tolist():
        at = (owners == owner).nonzero().flatten()
        name, alone = names[owner], at.numel() == flat.numel()
        inside = strided(flat[at] - begins[name], tuple(numbers.shape) if alone else (at.numel(),))
        outside = WHOLE if alone else strided(at, (at.numel(),))
        if inside is None or outside is None:
            raise InputError(f"{stored}: the checkpoint stores {name} in a way that is not supported")
        yield Link(name, None, inside, outside)

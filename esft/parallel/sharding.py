"""What is frozen, cut up over the ranks, where a whole model does not fit each of them (PyTorch's FSDP2).

FSDP2 gathers a layer's weights right before the layer computes, forward and backward, and lets go of them afterwards.
What trains is left out of it: every rank has all of that, its gradients are added up as without sharding, and a
checkpoint is the same.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from esft.errors import InputError
from esft.parallel.ranks import Ranks
from esft.transformers_internals import whole_layers


def shard_frozen(
    model: nn.Module, ranks: Ranks, device: torch.device, apart: Collection[nn.Parameter] = frozenset()
) -> None:
    """Leave each rank a part of every layer's frozen weights, in place, and all of the rest; on this device.

    Args:
        apart: parameters of which the ranks have different ones already; they stay as they are.

    From then on every rank has to run the model as often as the others: ``ranks.lockstep``. A single rank keeps all.
    Raises InputError for a model whose layers transformers does not mark as such.
    """
    if ranks.size == 1:
        return
    # Imported where they are needed: they take a second.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    layers = whole_layers(model)
    if not layers:
        raise InputError("shard frozen: the model's layers are not told, so there is nothing to cut up")
    mesh = init_device_mesh(device.type, (ranks.size,))
    for layer in layers:
        kept = {p for p in layer.parameters() if p.requires_grad or not p.numel() or p in apart}
        if kept != set(layer.parameters()):
            fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=kept)
    model.to(device)
    ranks.lockstep = True


def is_cut_up(tensor: Tensor) -> bool:
    """Whether a rank has but a part of it, and the others the rest."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, detached; collective where it is cut up."""
    if not is_cut_up(tensor):
        return tensor.detach()
    from torch.distributed.tensor import Replicate, Shard

    found: Any = tensor.detach()
    placements = [*found.placements]
    # Along one axis of the mesh after the other, the last cut first: that is FSDP2's, which is no plain ``Shard`` where
    # experts were dealt out before. No single operation does both, so ``full_tensor`` does the same, and warns of it.
    for axis in sorted(range(len(placements)), key=lambda axis: (isinstance(placements[axis], Shard), -axis)):
        placements[axis] = Replicate()
        found = found.redistribute(placements=placements)
    return found.to_local()

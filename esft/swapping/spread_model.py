"""Models that transformers has spread over ranks (``DistributedConfig``): their experts, to be dealt out anew.

transformers deals out ranges of experts, whichever of them train, and lets FSDP2 cut up all else; of experts it has as
many copies as there are ranks for each range, which FSDP2 cuts up, too. The experts come to their new ranks layer by
layer. All else stays where it is: FSDP2 gathers it before it computes, as it would have done.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from esft.errors import InputError
from esft.experts.moe_layers import MoELayer
from esft.experts.pooled_experts import BF16
from esft.experts.stock_layout import stacked_weights
from esft.parallel.ranks import Ranks
from esft.parallel.sharding import is_cut_up, whole
from esft.selection import ExpertSelection
from esft.transformers_internals import forget_spread, is_expert_parallel, is_marked, spread_by

_WITHOUT = {"tp_size": 1, "pp_size": 1, "fsdp_cpu_offload": False}  # what a DistributedConfig has to say


def check_spread(
    model: PreTrainedModel, layers: Sequence[MoELayer], selection: ExpertSelection, frozen_linear: str, ranks: Ranks
) -> bool:
    """Whether the experts of a stock model are spread over ranks.

    Raises InputError where they are in a way, or for a selection or a job, with which they cannot be dealt out anew.
    """
    config = spread_by(model)
    for field, value in _WITHOUT.items():
        if (found := getattr(config, field, value)) != value:
            raise InputError(
                f"{layers[0].name}: experts are not dealt out of a model that is spread with {field} {found}"
            )
    spread = [layer for layer in layers if is_expert_parallel(layer.experts) or any(_cut_up(layer))]
    if not spread:
        return False
    if ranks.size == 1:
        raise InputError(
            f"{spread[0].name}: the experts are spread over ranks: join the job (esft.parallel.join.joined) before the "
            "model is loaded, and name it as ranks"
        )
    if cut := [layer.name for layer in spread if not is_expert_parallel(layer.experts)]:
        raise InputError(f"{cut[0]}: experts that FSDP2 alone has cut up are not dealt out: ask for an ep_size, too")
    if unknown := [layer.name for layer in spread if not _is_known(layer)]:
        raise InputError(f"{unknown[0]}: experts are not dealt out that are spread over ranks in a way not known")
    for also in ("shared_experts", "non_expert_modules"):
        if getattr(selection, also):
            raise InputError(f"selection: {also} cannot train where FSDP2 has cut them up: use esft.load with ranks")
    if frozen_linear != BF16:
        raise InputError(f"frozen_linear {frozen_linear}: weights that FSDP2 has cut up stay in the model's dtype")
    return True


def _cut_up(layer: MoELayer) -> list[bool]:
    return [is_cut_up(p) for p in layer.experts.parameters()]


def _is_known(layer: MoELayer) -> bool:
    """Whether the weights are stacks that can be gathered, and nothing but these is in the module."""
    names = {name for name, _ in layer.experts.named_parameters()}
    return is_marked(layer.experts) and all(_cut_up(layer)) and names == {*stacked_weights(layer.experts, layer.name)}


def take_over(model: PreTrainedModel) -> None:
    """Make a spread model one that transformers does not take for its own any more, with everything still cut up."""
    from torch.distributed.fsdp import FSDPModule  # not above: that takes a second

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # what is whole since the last forward pass: whether it trains is told to the parts
    forget_spread(model)


@torch.no_grad()
def gathered(experts: nn.Module) -> nn.Module:
    """A module with the weights of all of a layer's experts, by their names, and none left in this one; collective."""
    found = nn.Module().train(experts.training)
    for name, parameter in experts.named_parameters(recurse=False):
        found.register_parameter(name, nn.Parameter(whole(parameter), requires_grad=False))
        storage = parameter.detach().to_local().untyped_storage()  # pyright: ignore[reportAttributeAccessIssue]
        if storage.resizable():  # no mapped file's: those pages go with the module
            storage.resize_(0)
    _let_go(experts)
    return found


def _let_go(experts: Any) -> None:
    """Have FSDP2 forget a module that leaves the model: its root keeps a list of all that were there when it ran.

    PyTorch has no name of its own for that; where its inner ones are others, the list keeps the memory.
    """
    with suppress(AttributeError):
        state = experts._get_fsdp_state()
        if state in (states := state._state_ctx.all_states):
            states.remove(state)
            state._comm_ctx.post_forward_order.clear()  # the same, of every pass since the last backward

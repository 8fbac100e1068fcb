"""The digest that tells one base from another."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from esft.checkpoint.original_format import original_format
from esft.errors import InputError
from esft.experts.model_state import known_state
from esft.transformers_internals import tied_names

SAMPLES = 64  # values of a tensor that enter the digest


def model_digest(model: PreTrainedModel, rounded: torch.dtype | None = None) -> str:
    """A digest of the weights of a stock model: 64 evenly spaced values of every tensor, rounded to bfloat16.

    The rounding makes it the same for a checkpoint loaded in another dtype. float16 is the exception, as its small
    values have fewer bits: ``rounded`` to it first, they are those of the model loaded in it. Raises InputError for
    weights that are not in memory.
    """
    state = model.state_dict()
    if away := [name for name, tensor in state.items() if tensor.is_meta]:
        raise InputError(f"{away[0]}: the weights are not in memory (offloaded?)")
    names = state.keys() - tied_names(model).keys()
    tensors = original_format(model)(names, state.__getitem__)
    return digest_of((name, sample(tensor, rounded)) for name, tensor in tensors)


def base_digest(model: PreTrainedModel, rounded: torch.dtype | None = None) -> str:
    """``model_digest`` of the weights below an adapter that is set and below what a swapped model has trained."""
    state = known_state(model)
    if state.adapters is not None and (state.swapped is not None or state.adapters.active is not None):
        return state.adapters.base_digest
    return model_digest(model, rounded) if state.swapped is None else state.swapped.base.digest


def sample(tensor: Tensor, rounded: torch.dtype | None) -> tuple[tuple[int, ...], Tensor]:
    flat = tensor.detach().reshape(-1)
    # Made on the CPU: a GPU may round them otherwise.
    index = torch.linspace(0, flat.numel() - 1, min(SAMPLES, flat.numel()), dtype=torch.float64).long()
    return tuple(tensor.shape), flat[index.to(flat.device)].to(rounded).bfloat16().float().cpu()


def digest_of(samples: Iterable[tuple[str, tuple[tuple[int, ...], Tensor]]]) -> str:
    digest = hashlib.sha256()
    for name, (shape, values) in sorted(samples):
        digest.update(f"{name} {shape} ".encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()

"""The digest that tells one base from another, and the settings of a model that its forward pass depends on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from math import prod
from typing import Any

import torch
import xxhash
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from esft.checkpoint.original_format import original_format
from esft.checkpoint.packed_tensors import Named, PackedTensor
from esft.errors import InputError
from esft.experts.model_state import Base, known_state
from esft.parallel.sharding import whole
from esft.transformers_internals import base_name, tied_names

SAMPLES = 64  # values of a tensor that enter the first part of a digest
CHUNK = 1 << 24  # values that are rounded and hashed at a time

# What a configuration holds beside what the forward pass of the base depends on.
NOT_OF_THE_FORWARD = {
    "architectures", "auto_map", "aux_loss_alpha", "bos_token_id", "chunk_size_feed_forward", "distributed_config",
    "dtype", "eos_token_id", "id2label", "initializer_range", "is_decoder", "is_encoder_decoder", "label2id",
    "num_labels", "output_attentions", "output_hidden_states", "output_router_logits", "pad_token_id",
    "pretraining_tp", "problem_type", "quantization_config", "return_dict", "router_aux_loss_coef",
    "router_z_loss_coef", "seq_aux", "sep_token_id", "tie_word_embeddings", "torch_dtype", "transformers_version",
    "use_cache",
}  # fmt: skip


def model_digest(model: PreTrainedModel, rounded: torch.dtype | None = None) -> str:
    """A digest of the weights of a stock model, every value rounded to bfloat16.

    It has two parts, joined by a hyphen: SHA-256 over 64 evenly spaced values of every tensor, which is all that
    adapters of format version 1 have, and XXH3 (128 bits) over all values. It finds accidents, not forgers.

    The rounding makes it the same for a checkpoint loaded in another dtype. float16 is the exception, as its small
    values have fewer bits: ``rounded`` to it first, they are those of the model loaded in it. Raises InputError for
    weights that are not in memory. Collective where some are cut up over ranks; it gathers a layer's at a time.
    """
    state = model.state_dict()
    if away := [name for name, tensor in state.items() if tensor.is_meta]:
        raise InputError(f"{away[0]}: the weights are not in memory (offloaded?)")
    tied = tied_names(model)
    names = [name for name in state if name not in tied]  # in the same order on all ranks
    return digest_of(original_format(model)(names, lambda name: whole(state[name])), rounded)


def model_base(model: PreTrainedModel, rounded: torch.dtype | None = None) -> Base:
    """What tells the model as it is, a stock one, from other bases; ``rounded`` as in ``model_digest``."""
    settings = forward_settings(model.config)
    return Base(base_name(model), model_digest(model, rounded), model.dtype, settings)


def base_below(model: PreTrainedModel, rounded: torch.dtype | None = None) -> Base:
    """``model_base`` of the weights below an adapter that is set and below what a swapped model has trained."""
    state = known_state(model)
    if state.adapters is not None and (state.swapped is not None or state.adapters.active is not None):
        return state.adapters.trained_from
    return model_base(model, rounded) if state.swapped is None else state.swapped.base


def digest_of(tensors: Iterable[Named], rounded: torch.dtype | None = None) -> str:
    """The digest of these tensors by their names in the original format, in whatever order they come."""
    found = {name: (f"{name} {tuple(tensor.shape)} ", *_read(tensor, rounded)) for name, tensor in tensors}
    sampled, whole = hashlib.sha256(), xxhash.xxh3_128()
    for _, (head, some, every) in sorted(found.items()):
        sampled.update(head.encode() + some)
        whole.update(head.encode() + every)
    return f"{sampled.hexdigest()}-{whole.hexdigest()}"


def _read(tensor: Tensor | PackedTensor, rounded: torch.dtype | None) -> tuple[bytes, bytes]:
    """Of a tensor's values: 64 evenly spaced ones, and a hash of all."""
    count = prod(tensor.shape)
    index = _sampled(count)
    some, hashed, begin = b"", xxhash.xxh3_128(), 0
    for part in tensor.pieces() if isinstance(tensor, PackedTensor) else tensor.detach().reshape(-1).split(CHUNK):
        held = index[(index >= begin) & (index < begin + len(part))] - begin
        some += part[held.to(part.device)].to(rounded).bfloat16().float().cpu().numpy().tobytes()
        values = part.to(rounded).bfloat16().view(torch.int16) if part.is_floating_point() else part.long()
        hashed.update(values.contiguous().cpu().numpy())
        begin += len(part)
    return some, hashed.digest()


def _sampled(count: int) -> Tensor:
    """The places of evenly spaced ones of so many values; made on the CPU, as a GPU may round them otherwise."""
    return torch.linspace(0, count - 1, min(SAMPLES, count), dtype=torch.float64).long()


def sampled_digest(model: nn.Module) -> str:
    """A digest of 64 evenly spaced values of every weight as it is in memory, for processes that load the same."""
    hashed = xxhash.xxh3_128()
    for name, weight in ((name, p.detach()) for name, p in model.named_parameters() if not p.is_meta):
        some = weight.reshape(-1)[_sampled(weight.numel()).to(weight.device)].cpu()
        hashed.update(name.encode() + some.view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()


def forward_settings(config: PreTrainedConfig) -> dict[str, Any]:
    """What of a text model's configuration its forward pass depends on, as JSON has it; an infinity as its name."""
    values = json.loads(json.dumps(config.get_text_config().to_dict(), default=str), parse_constant=str)
    return {k: v for k, v in values.items() if k not in NOT_OF_THE_FORWARD and not k.startswith("_")}

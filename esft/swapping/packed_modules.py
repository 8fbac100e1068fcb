"""Frozen linear layers and embeddings in few bits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from esft.checkpoint.original_format import original_format
from esft.checkpoint.packed_tensors import Named, PackedTensor
from esft.checkpoint.tensor_names import other_tensors
from esft.checkpoint.views import StoredTensor
from esft.errors import InputError
from esft.experts.moe_layers import moe_layers
from esft.experts.pooled_experts import BF16, bits_of
from esft.selection import ExpertSelection
from esft.transformers_internals import tied_names
from esft_kernels.formats import packed_matrix
from esft_kernels.formats.packed_matrix import ROW_FORMATS, packed_linear

FROZEN_LINEAR = (BF16, *ROW_FORMATS)

Modules = dict[str, nn.Linear | nn.Embedding]  # by their paths


class PackedModule(nn.Module):
    """In the place of an ``nn.Linear`` or an ``nn.Embedding`` whose weights are frozen.

    Args:
        module: the one in whose place this is, on any device; its bias is taken over.
        format_name: one of ``ROW_FORMATS``.
        device: where the weights will be; they are anything until ``write``.
    """

    def __init__(self, module: nn.Linear | nn.Embedding, format_name: str, device: torch.device | None = None):
        super().__init__()
        weight = module.weight
        self.rows, self.columns, self.dtype, self.format_name = *weight.shape, weight.dtype, format_name
        self.bias = getattr(module, "bias", None)
        self.stored = packed_matrix.layout(format_name, self.rows, self.columns)
        for name, stored in self.stored.items():
            # As integers, which ``model.to(dtype)`` leaves as they are.
            made = torch.empty(stored.shape, dtype=bits_of(stored.dtype), device=device or weight.device)
            self.register_parameter(f"weight_{name}", nn.Parameter(made, requires_grad=False))

    @property
    def parts(self) -> list[Tensor]:
        return [getattr(self, f"weight_{name}").view(stored.dtype) for name, stored in self.stored.items()]

    def write(self, weight: Tensor) -> None:
        """Put the weights [rows, columns]. Raises ValueError where they are not finite."""
        packed_matrix.encode(self.format_name, weight, self.parts)

    def extra_repr(self) -> str:
        return f"rows={self.rows}, columns={self.columns}, format={self.format_name!r}"


class PackedLinear(PackedModule):
    @property
    def weight(self) -> Tensor:
        """The decoded matrix [out, in]: some models multiply by a layer's weight themselves."""
        return packed_matrix.decode(self.format_name, self.parts, self.columns, self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return packed_linear(x, self.parts, self.bias, self.format_name)


class PackedEmbedding(PackedModule):
    def forward(self, ids: Tensor) -> Tensor:
        """Token ids of any shape -> [*ids.shape, columns], of the dtype that the weights had."""
        rows = [part.index_select(0, ids.reshape(-1)) for part in self.parts]
        return packed_matrix.decode(self.format_name, rows, self.columns, self.dtype).view(*ids.shape, self.columns)


def packable(model: PreTrainedModel, selection: ExpertSelection) -> Modules:
    """The modules, by their paths, that a training of this selection only reads, but for experts, routers and the head.

    What is of a class derived from these two has a forward of its own, what has another dtype than the model is wanted
    in it, and a tied weight is the head's as well.
    """
    layers, tied = moe_layers(model), tied_names(model)
    shared = {p for layer in layers for module in layer.shared_experts for p in module.parameters()}
    kept = {p for layer in layers for module in (layer.experts, layer.router) for p in module.parameters()}
    head = model.get_output_embeddings()
    kept |= set() if head is None else set(head.parameters())
    found: Modules = {}
    for name, module in model.named_modules():
        if type(module) not in (nn.Linear, nn.Embedding):
            continue
        weight, is_tied = module.weight, f"{name}.weight" in {*tied, *tied.values()}
        trains = selection.shared_experts if weight in shared else selection.non_expert_modules
        if not trains and not is_tied and weight not in kept and weight.dtype == model.dtype:
            found[name] = module  # pyright: ignore[reportArgumentType]
    return found


def packed(module: nn.Linear | nn.Embedding, format_name: str, device: torch.device | None = None) -> PackedModule:
    kind = PackedLinear if isinstance(module, nn.Linear) else PackedEmbedding
    return kind(module, format_name, device)


def without_weight(module: nn.Linear | nn.Embedding) -> nn.Module:
    """What is loaded of a module that is to be packed: its bias, where it has one."""
    rest = nn.Module()
    rest.register_parameter("bias", getattr(module, "bias", None))
    return rest


def check_finite(modules: Modules, format_name: str) -> None:
    """Raise InputError naming a module whose weights no format can hold."""
    for name, module in modules.items():
        if not module.weight.isfinite().all():
            raise InputError(f"{name}: its weights are not finite, so they cannot be kept in {format_name}")


def pack(model: PreTrainedModel, modules: Modules, format_name: str) -> None:
    """Put these modules of a model, whose weights are finite, into a format, in place and one by one."""
    for name, module in modules.items():
        small = packed(module, format_name)
        small.write(module.weight)
        model.set_submodule(name, small.train(module.training))


def linear_places(model: PreTrainedModel, selection: ExpertSelection) -> dict[str, StoredTensor]:
    """What a checkpoint holds of the weights that are ``packable`` in a stock model, by its own names."""
    weights = {f"{name}.weight": module.weight for name, module in packable(model, selection).items()}
    return other_tensors(original_format(model), weights)


class LinearFilling:
    """The packed modules of a model whose weights are on their way.

    Args:
        model: with packed modules, whose weights are anything.
        places: ``linear_places`` of the stock model.
        path: of the checkpoint, for messages.
    """

    def __init__(self, model: nn.Module, places: dict[str, StoredTensor], path: str):
        modules = {f"{name}.weight": m for name, m in model.named_modules() if isinstance(m, PackedModule)}
        self._places, self._path, self._modules = places, path, modules
        self._missing = {name: module.rows * module.columns for name, module in modules.items()}
        self._buffers: dict[str, Tensor] = {}  # what has come of a weight, and room for the rest

    def through(self, tensors: Iterable[Named]) -> Iterator[Named]:
        """The same tensors, each written to where it belongs before it is handed on.

        Raises InputError naming a tensor that does not fit or is not finite, and where one is missing at the end.
        """
        for name, value in tensors:
            if (stored := self._places.get(name)) is not None:
                try:
                    self._put(stored, value)
                except ValueError as error:
                    raise InputError(f"{self._path}: tensor {name}: {error}") from error
            yield name, value
        for stored in self._places.values():
            if any(link.parameter in self._missing for link in stored.links):
                raise InputError(f"{self._path}: tensor {stored.name} is missing")

    def _put(self, stored: StoredTensor, value: Tensor | PackedTensor) -> None:
        if tuple(value.shape) != stored.shape:
            raise ValueError(f"has shape {tuple(value.shape)}, the model's has {stored.shape}")
        tensor = value.read() if isinstance(value, PackedTensor) else value
        for link in stored.links:
            name, module = link.parameter, self._modules[link.parameter]
            if name not in self._buffers:
                self._buffers[name] = torch.empty(module.rows, module.columns, dtype=module.dtype)
            link.load(self._buffers[name], tensor)
            self._missing[name] -= link.inside.read(self._buffers[name]).numel()
            if not self._missing[name]:
                del self._missing[name]
                module.write(self._buffers.pop(name).to(module.parts[0].device))

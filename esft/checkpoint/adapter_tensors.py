"""Where the tensors of an adapter belong: in a model, and in the files of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from esft.checkpoint.expert_tensors import ExpertTensor, expert_tensors, expert_weights
from esft.checkpoint.other_tensors import Share, stored_tensors
from esft.errors import InputError
from esft.experts.moe_layers import MoELayer, moe_layers, routed_parameters
from esft.selection import ExpertSelection


@dataclass(frozen=True)
class Piece:
    """One of the model's weights that an adapter's tensor holds all or a part of.

    Attributes:
        weight: the model's; of stacked experts one expert's slice.
        parameter, expert: its name in a stock model, and which slice it is.
        part: which part of the weight.
    """

    weight: Tensor
    parameter: str
    expert: int | None
    part: ExpertTensor | Share

    def read(self) -> Tensor:
        if isinstance(self.part, ExpertTensor):
            return self.part.read(self.weight)
        return self.weight if self.part.inside is None else self.part.inside.read(self.weight)

    def give(self, value: Tensor) -> None:
        """Write what the weight has of an adapter's tensor into that."""
        if isinstance(self.part, ExpertTensor) or self.part.outside is None:
            value.copy_(self.read())
        else:
            self.part.outside.write(value, self.read())

    def put(self, weight: Tensor, value: Tensor) -> None:
        """Write what an adapter's tensor has of this weight into a tensor like it."""
        if isinstance(self.part, ExpertTensor):
            self.part.write(weight, value)
            return
        value = value if self.part.outside is None else self.part.outside.read(value.contiguous())
        if self.part.inside is None:
            weight.copy_(value.reshape(weight.shape))
        else:
            self.part.inside.write(weight, value)


@dataclass(frozen=True)
class Place:
    """A tensor in a checkpoint's files, or a slice of it along its first dimension, that changes with a slot.

    ``piece`` is what of it changes; None for all.
    """

    name: str
    index: int | None
    shape: tuple[int, ...]
    piece: Piece | None

    def put(self, tensor: Tensor, value: Tensor) -> None:
        if self.piece is None:
            tensor.copy_(value)
        else:
            self.piece.put(tensor, value)


@dataclass(frozen=True)
class Slot:
    """Where a tensor of an adapter belongs.

    Attributes:
        stored_name, index: the checkpoint's tensor, in the original format; of one that stacks experts, the slice.
        shape: of the adapter's tensor.
        pieces: the weights of the model that it holds.
    """

    stored_name: str
    index: int | None
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    def read(self) -> Tensor:
        """The adapter's tensor, from the model; a view where that can be."""
        first = self.pieces[0]
        if len(self.pieces) == 1:
            return first.read()
        value = first.weight.new_empty(self.shape)
        for piece in self.pieces:
            piece.give(value)
        return value

    def write(self, value: Tensor) -> None:
        """Put an adapter's tensor into the model."""
        for piece in self.pieces:
            piece.put(piece.weight, value)

    def places(self, as_in_memory: bool) -> Iterator[Place]:
        """Where it lies in files of the original format, or in files that hold the model's own tensors."""
        if not as_in_memory:
            yield Place(self.stored_name, self.index, self.shape, None)
            return
        for piece in self.pieces:
            yield Place(piece.parameter, piece.expert, tuple(piece.weight.shape), piece)


def adapter_slots(model: PreTrainedModel, selection: ExpertSelection) -> dict[str, Slot]:
    """Everything that the selection trains, by its name in an adapter; of a stock or a swapped model.

    Raises InputError where the checkpoint stores something of it in a way that is not supported.
    """
    layers = moe_layers(model)
    chosen = {layer.index: set(selection.experts.get(layer.index, ())) for layer in layers}
    slots = dict(_expert_slots(model, layers, chosen)) if any(chosen.values()) else {}
    if selection.shared_experts or selection.non_expert_modules:
        slots |= _other_slots(model, layers, selection)
    return slots


def _expert_slots(
    model: PreTrainedModel, layers: list[MoELayer], chosen: dict[int, set[int]]
) -> Iterator[tuple[str, Slot]]:
    weights = {
        (layer.index, expert): held
        for layer in layers
        for expert, held in expert_weights(model, layer, chosen[layer.index]).items()
    }
    for tensor in expert_tensors(model):
        if tensor.expert in chosen[tensor.layer]:
            piece = Piece(*weights[tensor.layer, tensor.expert][tensor.projection], tensor)
            index = tensor.expert if tensor.stacked else None
            yield tensor.name, Slot(tensor.stored_name, index, tuple(piece.read().shape), (piece,))


def _other_slots(
    model: PreTrainedModel, layers: list[MoELayer], selection: ExpertSelection
) -> Iterator[tuple[str, Slot]]:
    routed = {p for layer in layers for p in routed_parameters(layer)}
    shared = {p for layer in layers for m in layer.shared_experts for p in m.parameters()}
    others = {name: p for name, p in model.named_parameters() if p not in routed}
    trained = {
        name for name, p in others.items()
        if (selection.shared_experts if p in shared else selection.non_expert_modules)
    }  # fmt: skip
    for stored_name, stored in stored_tensors(model, others).items():
        names = {share.parameter for share in stored.shares}
        if names <= trained:
            pieces = tuple(Piece(others[s.parameter].detach(), s.parameter, None, s) for s in stored.shares)
            yield stored_name, Slot(stored_name, None, stored.shape, pieces)
        elif names & trained:
            raise InputError(
                f"{stored_name}: the checkpoint stores {', '.join(sorted(names))} in one tensor, and the selection "
                "does not train them all"
            )

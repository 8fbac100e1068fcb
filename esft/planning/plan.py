"""What a training would take, computed from a model's configuration alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import ceil
from typing import Any

from esft.adapters.lora import add_lora
from esft.checkpoint.source import configuration_digests
from esft.errors import InputError
from esft.optimizer.adamw import PIECE
from esft.optimizer.masters import master_type
from esft.optimizer.moments import MOMENTS
from esft.planning.fake_step import Batch, StepBytes, fake_step
from esft.planning.outline import Outline, outline, require_beside, skeleton_of
from esft.planning.stand_in import Sizes
from esft.runs.config import FROZEN, TrainConfig
from esft.selection import ExpertSelection
from esft.swapping.load import AUTO
from esft_kernels.formats.packed_matrix import nbytes
from esft_kernels.formats.resolve import resolve_format

# Python and the libraries, with what oneDNN makes and keeps for the shapes of a few steps: measured, docs/planning.md.
BASE = 600 << 20
# Of the paper's selections (token, p = 0.2) on DeepSeek-V2-Lite: 5 of 64 experts a layer, which get 22% of the rows.
TOP_P, EXPERT_SHARE, ROW_SHARE = 0.2, 5 / 64, 0.22
PLAIN = "bf16"
FORMATS = tuple(name for name in FROZEN if name != "auto")


@dataclass(frozen=True)
class Plan:
    """Bytes, but for what is said to be something else.

    Attributes:
        method, frozen, frozen_linear, optimizer, recompute: the settings; ``frozen`` is what frozen experts are kept
            in, and ``frozen_linear`` what other frozen matrices are.
        records, tokens: numbers that go through the model together; ``tokens`` is of all records.
        assumed: number of experts a layer that train, where it is an assumption.
        parameters, trained_parameters: numbers.
        trained_experts, frozen_experts, other_weights: of weights; the last with LoRA's, and with ``kept_base``.
        kept_base: of what trains, as the base has it, which ``kl_weight`` keeps.
        outside: of the frozen ones among the last, those of no layer: embeddings and head.
        masters: what is stepped, beside the weights.
        moments: of AdamW.
        gradients: of all that trains.
        activations: kept for the backward when it begins.
        step: the most that activations, gradients, and what comes and goes take together.
        base: Python and the libraries.
        peak: of all.
        stored: the outcome on disk.
        of_shorter: whether the step was planned of shorter records, as layers go token by token; see ``fake_step``.
    """

    method: str
    frozen: str
    frozen_linear: str
    optimizer: str
    recompute: str
    records: int
    tokens: int
    assumed: int | None
    parameters: int
    trained_parameters: int
    trained_experts: int
    frozen_experts: int
    other_weights: int
    kept_base: int
    outside: int
    masters: int
    moments: int
    gradients: int
    activations: int
    step: int
    base: int
    peak: int
    stored: int
    of_shorter: bool = False


def plan(
    model: str,
    selection: ExpertSelection | None = None,
    config: TrainConfig | None = None,
    *,
    frozen: str = "auto",
    tokens: int = 2048,
    top_p: float = TOP_P,
    experts: int | None = None,
    trust_remote_code: bool = False,
) -> Plan:
    """What a training on a CPU would take. No weights are read, and none need be there.

    Args:
        model: folder with a configuration, or hub id.
        selection: the experts to train, for method "esft". Without one their number is assumed: ``experts`` a layer, or
            as many as the paper's selections have, in proportion to ``top_p``.
        config: the settings; where None one record a step, and else the defaults.
        frozen: what frozen experts are kept in, one of ``FROZEN``; auto: what the checkpoint has them in.
        tokens: that go through the model together, those of all records of a micro batch.
        top_p: share of a layer's choices that the experts to train get.
        experts: to train in every layer.
        trust_remote_code: whether Python files of the checkpoint may be run.

    Raises InputError naming what does not fit the model, or each other.
    """
    config = config or TrainConfig(batch_size=1)
    whole = outline(model, config.dtype, trust_remote_code)
    if frozen == AUTO:
        frozen = (whole.shipped or PLAIN) if config.method == "esft" else PLAIN
    if frozen not in FORMATS:
        raise InputError(f"frozen must be one of {', '.join(FROZEN)}, got {frozen!r}")
    if frozen != PLAIN and config.method != "esft":
        raise InputError(f"frozen {frozen} goes with the method esft, not with {config.method}")
    assumed = None
    if config.method != "esft":
        if selection is not None or experts is not None:
            raise InputError(f"method {config.method} takes no expert selection")
    elif selection is None:
        selection, assumed = _assumed(whole, top_p, experts)
    else:
        config.check_selection(selection)
        selection.check({layer.index: layer.experts for layer in whole.layers}, whole.shared > 0)
    share = min(1.0, ROW_SHARE * top_p / TOP_P)
    records = config.micro_batch_size or config.batch_size
    if tokens < records:
        raise InputError(f"{tokens} tokens cannot be those of {records} records")
    batch = Batch(records, ceil(tokens / records), config.batch_size > records)
    chosen = _counts(whole, config, selection)
    # What the step does not depend on is left out, so that plans which differ in that alone share it.
    same = TrainConfig(method=config.method, recompute=config.recompute, lora_rank=config.lora_rank, dtype=config.dtype)
    trained, step = _step(model, configuration_digests(model), trust_remote_code, same, chosen, share, batch)
    return _summed(whole, config, frozen, chosen, trained, step, batch, assumed)


@dataclass(frozen=True)
class _Chosen:
    """What trains: numbers of experts in the order of the layers, and the parts beside them."""

    experts: tuple[int, ...]
    shared: bool
    others: bool


@dataclass(frozen=True)
class _Trained:
    """Elements of each tensor that trains and bytes of one, the routed experts' among them."""

    tensors: tuple[tuple[int, Any], ...]  # (elements, dtype)

    @property
    def count(self) -> int:
        return sum(size for size, _ in self.tensors)

    @property
    def nbytes(self) -> int:
        return sum(size * dtype.itemsize for size, dtype in self.tensors)


def _assumed(whole: Outline, top_p: float, experts: int | None) -> tuple[ExpertSelection, int]:
    most = max(layer.experts for layer in whole.layers)
    if experts is not None and experts > most:
        raise InputError(f"{experts} experts a layer: the model's layers have {most}")
    number = experts or max(1, min(most, round(EXPERT_SHARE * top_p / TOP_P * most)))
    return ExpertSelection({layer.index: list(range(min(number, layer.experts))) for layer in whole.layers}), number


def _counts(whole: Outline, config: TrainConfig, selection: ExpertSelection | None) -> _Chosen:
    if config.method == "full":
        return _Chosen(tuple(layer.experts for layer in whole.layers), True, True)
    if selection is None:
        return _Chosen((0,) * len(whole.layers), False, False)
    numbers = tuple(len(selection.experts.get(layer.index, ())) for layer in whole.layers)
    return _Chosen(numbers, selection.shared_experts, selection.non_expert_modules)


@cache
def _step(
    model: str, digests: tuple[str, ...], trust: bool, config: TrainConfig, chosen: _Chosen, share: float, batch: Batch
) -> tuple[_Trained, StepBytes]:
    """What trains, tensor by tensor, and what a step takes, without the room in which few bits are unpacked."""
    whole, skeleton = outline(model, config.dtype, trust), skeleton_of(model, config.dtype, trust)
    lora = config.method == "lora"
    recompute = "frozen" if config.recompute == "frozen" and not lora else "none"
    sizes = {
        layer.name: Sizes(layer.experts, count, layer.shape, share, recompute, biased=layer.biased, adapted=lora)
        for layer, count in zip(whole.layers, chosen.experts, strict=True)
    }
    if lora:
        skeleton = add_lora(skeleton, config.lora_rank, config.lora_alpha)
        tensors = [(p.numel(), p.dtype) for p in skeleton.parameters() if p.requires_grad]
    else:
        require_beside(skeleton, chosen.shared, chosen.others)
        tensors = [(p.numel(), p.dtype) for p in skeleton.parameters() if p.requires_grad]
        for layer, count in zip(whole.layers, chosen.experts, strict=True):
            g, d, f = layer.shape
            parts = (g * d, d * f, *((g, d) if layer.biased else ()))
            tensors += [(count * part, whole.dtype) for part in parts if count]
    return _Trained(tuple(tensors)), fake_step(skeleton, sizes, batch, config.recompute == "layers")


def _summed(
    whole: Outline,
    config: TrainConfig,
    frozen: str,
    chosen: _Chosen,
    trained: _Trained,
    step: StepBytes,
    batch: Batch,
    assumed: int | None,
) -> Plan:
    size = whole.dtype.itemsize
    trained_experts = sum(n * layer.expert_size for n, layer in zip(chosen.experts, whole.layers, strict=True)) * size
    frozen_experts, scratch = _frozen(whole, chosen, frozen)
    kept_base = trained.nbytes * (config.kl_weight > 0)
    additions = trained.nbytes * (config.method == "lora") + kept_base
    saved, linear_scratch = _packed_linear(whole.linear, size, chosen, config.frozen_linear)
    saved_outside, _ = _packed_linear([m for m in whole.linear if not m[3]], size, chosen, config.frozen_linear)
    outside = 0 if chosen.others else whole.outside * size - saved_outside
    other_weights = (whole.shared + whole.others) * size + additions - saved
    masters = sum(n * master_type(dtype).bytes_beside(dtype) for n, dtype in trained.tensors)
    moments = sum(MOMENTS[config.optimizer].count_bytes(n) for n, _ in trained.tensors)
    weights = trained_experts + frozen_experts + other_weights
    # The update follows when all activations are gone; it has two buffers of a piece, and as many for every moment.
    update = trained.nbytes + 4 * 4 * min(PIECE, trained.count)
    most = max(step.peak + max(scratch, linear_scratch), update)
    return Plan(
        config.method, frozen, config.frozen_linear, config.optimizer, config.recompute, batch.records, batch.tokens,
        assumed, whole.parameters, trained.count, trained_experts, frozen_experts, other_weights, kept_base, outside,
        masters, moments, trained.nbytes, step.kept, most, BASE, BASE + weights + masters + moments + most,
        trained.nbytes, step.of_shorter,
    )  # fmt: skip


def _packed_linear(
    linear: Sequence[tuple[int, int, bool, bool]], size: int, chosen: _Chosen, format_name: str
) -> tuple[int, int]:
    """Bytes that few bits save in frozen matrices beside the experts, and the room in which the largest is decoded."""
    saved, scratch = 0, 0
    for rows, columns, of_shared, _ in linear if format_name != PLAIN else ():
        if not (chosen.shared if of_shared else chosen.others):
            plain = rows * columns * size
            saved += plain - nbytes(format_name, rows, columns)
            scratch = max(scratch, plain)
    return saved, scratch


def _frozen(whole: Outline, chosen: _Chosen, frozen: str) -> tuple[int, int]:
    """Bytes of all frozen experts, and of the room in which one matrix is unpacked."""
    total, scratch, size = 0, 0, whole.dtype.itemsize
    for count, layer in zip(chosen.experts, whole.layers, strict=True):
        left, (g, d, f) = layer.experts - count, layer.shape
        if frozen == PLAIN:
            total += left * layer.expert_size * size
            continue
        kind = resolve_format(frozen)
        for rows, columns in ((g, d), (d, f)):
            total += kind.nbytes(left, rows, columns)
            scratch = max(scratch, 2 * kind.buffer_size(rows, columns) * size)
        total += left * (g + d) * layer.biased * size
    return total, scratch

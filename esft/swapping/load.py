"""Loading a model swapped: its files are read once, each expert straight into its pool."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from esft.checkpoint.device import first_device, on_one_device
from esft.checkpoint.digest import digest_of, forward_settings
from esft.checkpoint.folder import Checkpoint
from esft.checkpoint.load import load_model, load_without
from esft.checkpoint.packed_tensors import packed_format
from esft.checkpoint.source import downloaded
from esft.errors import InputError
from esft.experts.model_state import Base, Swapped
from esft.experts.moe_layers import MoELayer, moe_layers
from esft.experts.pooled_experts import BF16
from esft.experts.stock_layout import Layout
from esft.memory import check_fits, memory_watched
from esft.parallel.ranks import ALONE, Ranks
from esft.selection import ExpertSelection
from esft.swapping.fill import Filling, Places, expert_places
from esft.swapping.load_state import is_pool
from esft.swapping.packed_modules import LinearFilling, Modules, linear_places, packable, packed, without_weight
from esft.swapping.swap import begin, check, deals, emptied, swap, thaw
from esft.transformers_internals import base_name

AUTO = "auto"  # in place of a format: what the checkpoint has


def load(
    path: str,
    selection: ExpertSelection,
    frozen: str = AUTO,
    dtype: str = "auto",
    backend: str = "auto",
    recompute: str = "none",
    trust_remote_code: bool = False,
    progress: bool = False,
    frozen_linear: str = BF16,
    ranks: Ranks = ALONE,
) -> PreTrainedModel:
    """A checkpoint as a swapped model in evaluation mode, its frozen experts in few bits where so asked.

    What ``swap`` makes the stock model, which is never in memory: each expert goes from the files to its pool, so
    that at no time there is more than the finished model and one layer of the checkpoint. Where that cannot be (experts
    that are a ModuleList, files with names of an older version, several GPUs), the stock model is loaded and swapped.

    Args:
        path: checkpoint folder or hub id.
        selection: what trains.
        frozen: what the frozen experts are kept in: "bf16" (the dtype that is computed in), a format of
            ``esft_kernels.formats``, or "auto", that of the checkpoint: what comes in fp8 or mxfp4 stays as it is.
        dtype: of all else, as in ``load_model``.
        backend, recompute, frozen_linear, ranks: see ``swap``; a rank reads all files, and keeps its own experts.
        trust_remote_code: whether Python files of the checkpoint may be run.
        progress: show a bar.

    Raises InputError for what ``swap`` and ``load_model`` refuse, for a format that cannot hold the experts, and for
    weights that are quantized in another way; OutOfMemory where the memory has no room.
    """
    checkpoint = Checkpoint.open(downloaded(path), trust_remote_code)
    shipped = packed_format(checkpoint.config, path)
    frozen = (shipped or BF16) if frozen == AUTO else frozen
    if (places := _places(checkpoint, selection, backend, recompute, frozen, frozen_linear, ranks)) is None:
        whole = load_model(path, dtype, trust_remote_code)
        return swap(whole, selection, backend, recompute, frozen, frozen_linear, ranks)
    linear = linear_places(checkpoint.skeleton, selection) if frozen_linear != BF16 else {}
    taken: list[MoELayer] = []
    layouts: dict[str, Layout] = {}
    to_pack: Modules = {}

    def take_experts(model: PreTrainedModel) -> Iterable[str]:
        layers = moe_layers(model)
        with torch.device("cpu"):  # where layouts are tried out
            layouts.update(check(layers, selection, first_device(), backend, recompute, frozen, frozen_linear))
        to_pack.update(packable(model, selection) if frozen_linear != BF16 else {})
        for name, module in to_pack.items():
            model.set_submodule(name, without_weight(module))
        for layer in layers:
            taken.append(layer)
            setattr(layer.block, layer.attribute, nn.Module())
        return [*(layer.name for layer in layers), *to_pack]

    model = load_without(path, take_experts, dtype, trust_remote_code)
    stock: dict[str, nn.Module] = {}
    with memory_watched(path) as reads:
        for layer, deal in zip(taken, deals(taken, selection, ranks), strict=True):
            ids, device = selection.experts.get(layer.index, []), next(layer.block.parameters()).device
            layout, meta = layouts[layer.name], layer.experts.to(model.dtype)
            experts = layout.swapped(meta, ids, backend, recompute, frozen, device, deal)
            setattr(layer.block, layer.attribute, experts.eval())
            stock[layer.name] = emptied(meta, layout)
        for name, module in to_pack.items():
            module.bias = getattr(model.get_submodule(name), "bias", None)
            model.set_submodule(name, packed(module, frozen_linear, model.device).eval())
        if model.device.type == "cpu":
            check_fits(path, sum(p.nbytes for name, p in model.named_parameters() if is_pool(name)))
        count = len(checkpoint.names())
        tensors = reads(tqdm(checkpoint.tensors(), total=count, desc="loading", unit="tensor", disable=not progress))
        tensors = LinearFilling(model, linear, path).through(tensors)
        digest = digest_of(Filling(model, places, path).through(tensors))
    base = Base(base_name(model), digest, model.dtype, forward_settings(model.config))
    flags = {name: p.requires_grad for name, p in model.named_parameters() if not is_pool(name)}
    flags |= {f"{name}.{own}": True for name in stock for own in layouts[name].names}  # as the stock model's would be
    lossless = frozen in (BF16, shipped) and frozen_linear == BF16
    begin(model, Swapped(selection, base, flags, frozen, frozen_linear, lossless, stock), ranks)
    return thaw(model)


def _places(
    checkpoint: Checkpoint,
    selection: ExpertSelection,
    backend: str,
    recompute: str,
    frozen: str,
    frozen_linear: str,
    ranks: Ranks,
) -> Places | None:
    """Where the experts' tensors belong; None where they cannot go from the files to their pools.

    Raises what ``check`` does, before anything is read.
    """
    layers, device = moe_layers(checkpoint.skeleton), first_device()
    layouts = check(layers, selection, device, backend, recompute, frozen, frozen_linear, ranks)
    fused = all(layer.name in layouts and layouts[layer.name].is_fused for layer in layers)
    places = expert_places(checkpoint.skeleton)
    if (missing := places.keys() - checkpoint.names()) and missing != places.keys():
        raise InputError(f"{checkpoint.folder}: tensor {min(missing)} is missing ({len(missing)} missing in all)")
    return places if on_one_device() and fused and not missing else None

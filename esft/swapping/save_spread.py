"""The stock model's checkpoint from a swapped model whose weights are spread over ranks, a piece at a time.

What the other ranks hold of a weight comes to the one that writes when it is that weight's turn: it never has more than
one file's weights and one layer's beside its own.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from esft.checkpoint.original_format import by_layer, original_format
from esft.errors import InputError
from esft.experts.model_state import swapped_state
from esft.experts.moe_layers import MoELayer, moe_layers, ranks_of
from esft.experts.pooled_experts import PROJECTIONS, Experts
from esft.parallel.ranks import Ranks
from esft.parallel.sharding import whole
from esft.storage.files import write_json
from esft.storage.outputs import disk_errors
from esft.swapping.load_state import is_pool
from esft.transformers_internals import names_not_saved, tied_names

FILE = 5 << 30  # bytes of one file of weights
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
NEW = ".esft-new"  # where files are until all are written

Readers = dict[str, Callable[[], Tensor]]


def save_spread(model: PreTrainedModel, folder: Path, writes: bool, save_rest: Callable[[], object]) -> None:
    """Write ``WHOLE``, or several files with an index, and the rest of a checkpoint; collective.

    Args:
        folder: of the checkpoint. What it holds of an earlier one stays until all weights are written.
        writes: whether this rank is the one that does.
        save_rest: writes all but the weights, and may clear an earlier checkpoint's away.

    Raises RankError outside of the job that holds the weights, InputError for cut-up experts in few bits, and DiskError
    for a full disk; then nothing is left.
    """
    readers = _readers(model, ranks_of(model))
    left_out = {*tied_names(model), *names_not_saved(model)}
    names = [name for name in readers if name not in left_out]
    if not writes:
        for name in (name for group in by_layer(names) for name in group):
            readers[name]()  # its part
        return
    with disk_errors(folder), _new_below(folder) as new:
        files = _written(original_format(model)(names, lambda name: readers[name]()), new)
        save_rest()
        count = len(files)
        called = [WHOLE] if count == 1 else [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
        for name in {WHOLE, INDEX} - {*called}:
            (folder / name).unlink(missing_ok=True)  # an earlier one's
        for number, name in enumerate(called):
            (new / str(number)).replace(folder / name)
        if count > 1:
            where = {tensor: name for name, tensors in zip(called, files, strict=True) for tensor in tensors}
            total = sum(sum(tensors.values()) for tensors in files)
            write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": where})


@contextmanager
def _new_below(folder: Path) -> Iterator[Path]:
    """A folder in this one for the block alone; what a process that was killed in it has left is cleared away."""
    new = folder / NEW
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _written(tensors: Iterable[tuple[str, Tensor]], folder: Path) -> list[dict[str, int]]:
    """Write files called 0, 1, ... Returns of each the names of its tensors, and their bytes."""
    files: list[dict[str, int]] = []
    held: dict[str, Tensor] = {}

    def flush() -> None:
        save_file(held, folder / str(len(files)), {"format": "pt"})
        files.append({name: tensor.nbytes for name, tensor in held.items()})
        held.clear()

    for stored, tensor in tensors:
        if held and sum(each.nbytes for each in held.values()) + tensor.nbytes > FILE:
            flush()
        held[stored] = tensor.cpu().contiguous()
    flush()
    return files


def _readers(model: PreTrainedModel, ranks: Ranks) -> Readers:
    """What reads each of the stock model's tensors, by its name: whole on the rank that writes; collective."""
    layers = {layer.name: layer for layer in moe_layers(model) if isinstance(layer.experts, Experts)}
    found: Readers = {}
    for name, tensor in model.state_dict().items():
        path = name.rpartition(".")[0]
        if not is_pool(name):
            found[name] = lambda tensor=tensor: whole(tensor)
        elif path in layers:
            found |= _of_experts(model, layers.pop(path), ranks)
    return found


def _of_experts(model: nn.Module, layer: MoELayer, ranks: Ranks) -> Readers:
    experts: Experts = layer.experts  # pyright: ignore[reportAssignmentType]
    ours = dict(zip(experts.stock_names, PROJECTIONS, strict=False))
    found: Readers = {}
    for name, _ in swapped_state(model).stock[layer.name].named_parameters(recurse=False):
        if experts.deal is None and experts.stored.get(ours[name]):
            raise InputError(f"experts in {experts.frozen} that are cut up over ranks cannot be saved whole")
        read = _dealt if experts.deal is not None else _cut_up
        found[f"{layer.name}.{name}"] = lambda read=read, own=ours[name]: read(experts, own, ranks)
    return found


def _cut_up(experts: Experts, name: str, ranks: Ranks) -> Tensor:
    return experts.in_order(*(whole(getattr(experts, f"{pool}_{name}")).cpu() for pool in ("trained", "frozen")))


def _dealt(experts: Experts, name: str, ranks: Ranks) -> Tensor:
    """All experts' weights of this name [E, ...]; without values on ranks other than the first."""
    which = PROJECTIONS.index(name)
    held = [expert for expert in range(experts.num_experts) if experts.holds(expert)]
    found = ranks.collected({str(expert): experts.weights_of(expert)[which] for expert in held})
    if not ranks.main:
        return torch.empty(0, device="meta")
    return torch.stack([found[str(expert)][0] for expert in range(experts.num_experts)])

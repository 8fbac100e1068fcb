"""Checkpoints of true sizes with random weights, written a layer at a time, for measuring what big models take."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from benchmarks.plan import MODELS
from esft.checkpoint.load import load_skeleton
from esft.checkpoint.original_format import by_layer, original_format

TOKENIZER = Path(__file__).parents[1] / "examples" / "tiny-moe"
DRAWN = 1 << 26  # values that are drawn once; every tensor is a piece of them


def write_checkpoint(name: str, folder: Path) -> Path:
    """A checkpoint of ``benchmarks/models/NAME`` in bf16; what an earlier call has written of it stays.

    The tokenizer is the small model's. Norms are ones, biases zeros, all else is normal with a deviation of 0.02.
    """
    done = folder / "model.safetensors.index.json"
    if done.exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(MODELS / name / "config.json", folder)
    for file in TOKENIZER.iterdir():
        if file.name.startswith(("tokenizer", "special_tokens", "chat_template")):
            shutil.copy(file, folder)
    skeleton = load_skeleton(str(folder))
    state = skeleton.state_dict()
    normal = torch.empty(DRAWN).normal_(std=0.02, generator=torch.Generator().manual_seed(0)).bfloat16()
    groups, index, total = list(by_layer(state)), {}, 0
    for number, names in enumerate(tqdm(groups, desc=f"writing {name}", unit="layer")):
        file = f"model-{number + 1:05d}-of-{len(groups):05d}.safetensors"
        stored = dict(original_format(skeleton)(names, state.__getitem__))
        tensors = {key: _values(key, tensor.shape, normal, number) for key, tensor in stored.items()}
        index |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
        if not (folder / file).exists():
            save_file(tensors, folder / ".begun", {"format": "pt"})
            (folder / ".begun").rename(folder / file)
    done.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=1) + "\n")
    return folder


def _values(name: str, shape: torch.Size, normal: torch.Tensor, number: int) -> torch.Tensor:
    """Different numbers for every tensor and layer, the same in every run."""
    if name.endswith("norm.weight"):
        return torch.ones(shape, dtype=torch.bfloat16)
    if name.endswith("bias"):
        return torch.zeros(shape, dtype=torch.bfloat16)
    count, seed = shape.numel(), sum(name.encode()) * 7919 + number * 104_729
    if count > DRAWN // 2:
        return normal.roll(seed % DRAWN).repeat(-(-count // DRAWN))[:count].view(shape)
    shift = seed % (DRAWN - count)
    return normal[shift : shift + count].view(shape).clone()  # a file holds no tensor twice

"""Checkpoint folders: loading models, reading tensors, and the digest that tells one base from another."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from esft.errors import InputError
from esft.families import Family, checkpoint_name, expert_tensor_name, family_of, model_family, moe_layers
from esft.files import open_safetensors, read_json

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SAMPLES = 64  # values of a tensor that enter the digest

_LAYER = re.compile(r"\blayers\.(\d+)\.")


def load_model(path: str, dtype: str = "auto") -> PreTrainedModel:
    """A causal language model in evaluation mode.

    Raises InputError when the folder is not a checkpoint, or lacks a tensor that the model has.
    """
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise InputError(f"{path}: cannot load a model ({first_line(error)})") from error
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise InputError(f"{path}: tensor {missing[0]} is missing ({len(missing)} missing in all)")
    return model.eval()


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer, which must have a chat template. Raises InputError naming the folder."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot load a tokenizer ({first_line(error)})") from error
    if tokenizer.chat_template is None:
        raise InputError(f"{path}: the tokenizer has no chat template")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def first_line(error: Exception) -> str:
    """What an error of another library says, for a message in one line."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


@dataclass(frozen=True)
class Checkpoint:
    """The safetensors files of a folder: which tensor lies in which file."""

    folder: Path
    files: dict[str, str]  # tensor name -> file name
    family: Family
    num_layers: int
    tied: bool  # whether the output projection is the embedding

    @classmethod
    def open(cls, folder: str | Path) -> Checkpoint:
        """Raises InputError when the folder has no config or no safetensors weights."""
        folder = Path(folder)
        if not (folder / "config.json").is_file():
            raise InputError(f"{folder}: not a checkpoint folder (no config.json)")
        try:
            config = AutoConfig.from_pretrained(folder)
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"{folder / 'config.json'}: not a model's configuration ({first_line(error)})") from error
        if (folder / INDEX).is_file():
            index = read_json(folder / INDEX)
            files = index.get("weight_map") if isinstance(index, dict) else None
            if not isinstance(files, dict):
                raise InputError(f"{folder / INDEX}: has no weight_map")
        elif (folder / WEIGHTS).is_file():
            with open_safetensors(folder / WEIGHTS) as handle:
                files = dict.fromkeys(handle.keys(), WEIGHTS)
        else:
            raise InputError(f"{folder}: no {WEIGHTS} and no {INDEX} (pickled weights are never loaded)")
        text = config.get_text_config()
        return cls(folder, files, family_of(config.model_type), text.num_hidden_layers, bool(text.tie_word_embeddings))

    @contextmanager
    def read(self, file: str) -> Iterator:
        with open_safetensors(self.folder / file) as handle:
            yield handle

    def digest(self) -> str:
        """The digest of these weights; equal to ``model_digest`` of the model loaded from them."""
        samples = {}
        for file in sorted(set(self.files.values())):
            with self.read(file) as handle:
                for name in handle.keys():  # noqa: SIM118 (a safetensors handle is no mapping)
                    if self.belongs(name):
                        samples[name] = _sample(handle.get_tensor(name))
        return _hash(samples.items())

    def belongs(self, name: str) -> bool:
        """Whether a tensor is a weight of the model: some files hold further prediction layers or what is computed."""
        layer = _LAYER.search(name)
        beyond = layer is not None and int(layer[1]) >= self.num_layers
        return not (beyond or name.endswith("inv_freq") or (self.tied and name == "lm_head.weight"))


def model_digest(model: PreTrainedModel) -> str:
    """A digest of the weights of a stock model: 64 evenly spaced values of every tensor, rounded to bfloat16.

    The rounding makes it the same for a checkpoint loaded in another dtype.
    """
    family, samples = model_family(model), {}
    layers = moe_layers(model)
    routed = {f"{layer.name}.{name}" for layer in layers for name, _ in layer.experts.named_parameters()}
    for layer in layers:
        gate_up, down = layer.experts.gate_up_proj, layer.experts.down_proj
        for e in range(layer.num_experts):
            gate, up = gate_up[e].chunk(2)
            for projection, tensor in enumerate((gate, up, down[e])):
                samples[expert_tensor_name(layer.name, e, projection, family)] = _sample(tensor)
    tied = {"lm_head.weight"} if model.config.get_text_config().tie_word_embeddings else set()
    for name, tensor in model.state_dict().items():
        if name not in routed | tied:
            samples[checkpoint_name(name, family)] = _sample(tensor)
    return _hash(samples.items())


def _sample(tensor: Tensor) -> tuple[tuple[int, ...], Tensor]:
    flat = tensor.detach().reshape(-1)
    index = torch.linspace(0, flat.numel() - 1, min(SAMPLES, flat.numel()), device=flat.device, dtype=torch.float64)
    return tuple(tensor.shape), flat[index.long()].bfloat16().float().cpu()


def _hash(samples: Iterable[tuple[str, tuple[tuple[int, ...], Tensor]]]) -> str:
    digest = hashlib.sha256()
    for name, (shape, values) in sorted(samples):
        digest.update(f"{name} {shape} ".encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()

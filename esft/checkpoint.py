"""Checkpoint folders: loading models, reading tensors, and the digest that tells one base from another."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from esft.errors import InputError
from esft.families import Family, checkpoint_name, expert_tensor_name, family_of, model_family, moe_layers
from esft.files import open_safetensors, read_json

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SAMPLES = 64  # values of a tensor that enter the digest

# What the digest covers: routed experts, attention output projections and the embedding. All families have them under
# these names both in memory and on disk, and no kind of fine-tuning leaves all of them alone.
_DIGESTED = re.compile(r"\.experts\.\d+\.[^.]+\.weight$|\.o_proj\.weight$|embed_tokens\.weight$")
_LAYER = re.compile(r"\blayers\.(\d+)\.")


def load_model(path: str, dtype: str = "auto") -> PreTrainedModel:
    """A causal language model in evaluation mode. Raises InputError when the folder is not a checkpoint."""
    try:
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot load a model ({_first_line(error)})") from error


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer, which must have a chat template. Raises InputError naming the folder."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot load a tokenizer ({_first_line(error)})") from error
    if tokenizer.chat_template is None:
        raise InputError(f"{path}: the tokenizer has no chat template")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


@dataclass(frozen=True)
class Checkpoint:
    """The safetensors files of a folder: which tensor lies in which file."""

    folder: Path
    files: dict[str, str]  # tensor name -> file name
    family: Family
    num_layers: int

    @classmethod
    def open(cls, folder: str | Path) -> Checkpoint:
        """Raises InputError when the folder has no config or no safetensors weights."""
        folder = Path(folder)
        if not (folder / "config.json").is_file():
            raise InputError(f"{folder}: not a checkpoint folder (no config.json)")
        config = AutoConfig.from_pretrained(folder)
        if (folder / INDEX).is_file():
            files = read_json(folder / INDEX)["weight_map"]
        elif (folder / WEIGHTS).is_file():
            with open_safetensors(folder / WEIGHTS) as handle:
                files = dict.fromkeys(handle.keys(), WEIGHTS)
        else:
            raise InputError(f"{folder}: no {WEIGHTS} and no {INDEX} (pickled weights are never loaded)")
        return cls(folder, files, family_of(config.model_type), config.get_text_config().num_hidden_layers)

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
                    layer = _LAYER.search(name)
                    # Extra prediction layers lie in some checkpoints and are not part of the model.
                    if _DIGESTED.search(name) and not (layer and int(layer[1]) >= self.num_layers):
                        samples[name] = _sample(handle.get_tensor(name))
        return _hash(samples.items())


def model_digest(model: PreTrainedModel) -> str:
    """A digest of the weights of a stock model: 64 evenly spaced values of each covered tensor, as float32.

    It does not depend on the dtype a checkpoint was loaded in, as long as that holds the checkpoint's values exactly.
    """
    family, samples = model_family(model), {}
    for layer in moe_layers(model):
        gate_up, down = layer.experts.gate_up_proj, layer.experts.down_proj
        for e in range(layer.num_experts):
            gate, up = gate_up[e].chunk(2)
            for projection, tensor in enumerate((gate, up, down[e])):
                samples[expert_tensor_name(layer.name, e, projection, family)] = _sample(tensor)
    for name, parameter in model.named_parameters():
        if _DIGESTED.search(name):
            samples[checkpoint_name(name, family)] = _sample(parameter)
    return _hash(samples.items())


def _sample(tensor: Tensor) -> tuple[tuple[int, ...], Tensor]:
    flat = tensor.detach().reshape(-1)
    index = torch.linspace(0, flat.numel() - 1, min(SAMPLES, flat.numel()), device=flat.device, dtype=torch.float64)
    return tuple(tensor.shape), flat[index.long()].float().cpu()


def _hash(samples: Iterable[tuple[str, tuple[tuple[int, ...], Tensor]]]) -> str:
    digest = hashlib.sha256()
    for name, (shape, values) in sorted(samples):
        digest.update(f"{name} {shape} ".encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()

"""Where a model comes from: what its folder and its configuration may say, before another library acts on it."""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig

from esft.checkpoint.configuration import check_model, check_numbers
from esft.checkpoint.packed_tensors import check_pairs
from esft.errors import InputError, first_line
from esft.storage.files import FLOATS, file_digest, open_safetensors, safetensors_header
from esft.storage.reading import read_json, shown

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
GENERATION = "generation_config.json"
LENGTH = 4096  # tokens of a record where nothing is said, the paper's

_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
# Of a hub's checkpoint: weights, configuration, code, tokenizer, chat template, license; no weights in other formats.
_FETCHED = ("*.json", "*.safetensors", "*.py", "*.jinja", "*.model", "*.txt", "*.tiktoken", "LICENSE*")
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")


def check_folder(path: str | Path) -> Path | None:
    """The folder of a local checkpoint; None for a hub id.

    Raises InputError for one that is not there, and for one that holds what is no file or is not a model.
    """
    folder = Path(path)
    if not str(path):  # which pathlib takes for the working folder
        raise InputError("'': no such folder")
    if not os.path.isdir(folder):
        if os.path.lexists(folder):
            raise InputError(f"{path}: is a file, not a checkpoint folder")
        if not _HUB_ID.fullmatch(str(path)):
            raise InputError(f"{path}: no such folder")
        return None
    try:
        for entry in folder.iterdir():
            mode = entry.stat().st_mode if entry.exists() else stat.S_IFREG  # a broken link is told of when it is read
            if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
                raise InputError(f"{entry}: is no regular file, and is not read")
    except OSError as error:
        raise InputError(f"{error.filename}: {error.strerror}") from error
    if (folder / "adapter_config.json").exists():
        raise InputError(f"{path}: holds a PEFT adapter, not a model: name its base as the model and it as the adapter")
    return folder


def open_config(path: str | Path, trust_remote_code: bool = False) -> PreTrainedConfig:
    """A checkpoint's configuration.

    Args:
        path: folder or hub id.
        trust_remote_code: whether Python files that lie beside the configuration may be run where it names them.

    Raises InputError where it is missing, is none, or says what no model has.
    """
    folder = check_folder(path)
    if folder is not None and not (folder / CONFIG).exists():
        raise InputError(f"{path}: not a checkpoint folder (no {CONFIG})")
    if folder is not None:
        _check_generation(folder / GENERATION)
    where = str(path if folder is None else folder / CONFIG)
    try:
        raw = read_json(folder / CONFIG) if folder is not None else PreTrainedConfig.get_config_dict(path)[0]
        check_numbers(raw, where)
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        check_model(config, where)
        return config
    except InputError:
        raise
    except Exception as error:  # the configurations' validators raise errors of their own kinds
        raise _refused(path, folder, where, error, trust_remote_code) from error


def configuration_digests(path: str | Path) -> tuple[str, ...]:
    """What tells whether a checkpoint folder's configuration and code are still the same; empty for a hub id."""
    folder = check_folder(path)
    files = () if folder is None else (p for p in folder.iterdir() if p.name == CONFIG or p.suffix == ".py")
    return tuple(file_digest(file) for file in sorted(files) if file.is_file())


def _check_generation(path: Path) -> None:
    """Raise InputError for generation settings that are none; transformers passes over what it cannot read."""
    if not os.path.lexists(path):
        return
    if not isinstance(values := read_json(path), dict):
        raise InputError(f"{path}: not a mapping of settings")
    try:
        GenerationConfig.from_dict(values)
    except Exception as error:  # whatever is said of values of other types
        raise InputError(f"{path}: not settings of a generation ({first_line(error)})") from error


def _refused(path: str | Path, folder: Path | None, where: str, error: Exception, trusted: bool) -> InputError:
    said = first_line(error)
    if not trusted and "trust_remote_code" in str(error):
        return InputError(f"{where}: names Python code of its own; read it, and allow it: `trust_remote_code=True`")
    if folder is None and isinstance(error, OSError):
        return InputError(f"{path}: no such folder, and no model of that name can be had from the hub ({said})")
    return InputError(f"{where}: not a model's configuration ({said})")


def weight_files(path: str | Path) -> dict[str, str]:
    """Tensor name -> the file of a checkpoint folder, or of a hub's checkpoint, that holds it.

    Raises InputError for one without safetensors weights or with two sets of them, and for an index that names anything
    but safetensors files right in the folder.
    """
    folder = check_folder(path)
    if folder is None:
        index = _from_hub(str(path), INDEX)
        return {} if index is None else _indexed(index)
    if (folder / INDEX).exists():
        files = _indexed(folder / INDEX)
        if (folder / WEIGHTS).exists() and set(files.values()) != {WEIGHTS}:  # libraries differ in which they read
            raise InputError(f"{folder}: holds {WEIGHTS} and an index of other files; take out what is not the model")
        for file in sorted(set(files.values())):
            with open_safetensors(folder / file) as handle:
                held = set(handle.keys())
            if absent := sorted(name for name, its in files.items() if its == file and name not in held):
                raise InputError(f"{folder / file}: holds no tensor {absent[0]}, as the index says it does")
        return files
    if not (folder / WEIGHTS).exists():
        raise InputError(f"{folder}: no {WEIGHTS} and no {INDEX}{_pickled(folder)}")
    with open_safetensors(folder / WEIGHTS) as handle:
        return dict.fromkeys(handle.keys(), WEIGHTS)


def downloaded(path: str | Path) -> Path:
    """The folder of a checkpoint: a local one itself, a hub's as the hub's cache has it, fetched where it has not."""
    if (folder := check_folder(path)) is not None:
        return folder
    try:
        return Path(snapshot_download(str(path), allow_patterns=_FETCHED))
    except Exception as error:  # of the network, or of the name
        raise InputError(f"{path}: cannot be had from the hub ({first_line(error)})") from error


def check_dtypes(path: str | Path, files: dict[str, str], config: PreTrainedConfig) -> None:
    """Raise InputError for a checkpoint folder whose tensors are of no dtypes that its configuration allows.

    Some of a model's tensors are whole numbers (tables of tokens, packed weights beside their scales); all cannot be.
    Where the configuration says how the weights are quantized, some of them have to be, with all that belongs to them.
    """
    folder = check_folder(path)
    headers = {} if folder is None else {file: safetensors_header(folder / file) for file in set(files.values())}
    tensors = [(file, name, info) for file, header in headers.items() for name, info in header.items()]
    for file, name, info in tensors:
        if info.dtype.startswith("C"):
            raise InputError(f"{path}/{file}: tensor {name} is {info.dtype}, which no model computes in")
    if tensors and not any(info.dtype in FLOATS for _, _, info in tensors):
        file, name, info = tensors[0]
        raise InputError(f"{path}/{file}: tensor {name} is {info.dtype}, and none is of floating point")
    quantized = getattr(config, "quantization_config", None) is not None
    if tensors and quantized and all(info.dtype in FLOATS for _, _, info in tensors):
        raise InputError(f"{path}/{CONFIG}: has a quantization_config, and no tensor is quantized; take it out")
    check_pairs(config, {name: info for _, name, info in tensors}, path)


def _from_hub(model: str, name: str) -> Path | None:
    """A file of a hub's checkpoint, None where it has none."""
    try:
        return Path(hf_hub_download(model, name))
    except EntryNotFoundError:  # offline, one that is not in the cache too
        return None
    except Exception as error:  # of the network, or of the name
        raise InputError(f"{model}: cannot be had from the hub ({first_line(error)})") from error


def _pickled(folder: Path) -> str:
    """What a user can do where only pickles are there."""
    if not any((folder / name).exists() for name in _PICKLES):
        return " (pickled weights are never loaded)"
    code = (
        f"from transformers import AutoModelForCausalLM as M; M.from_pretrained({str(folder)!r}).save_pretrained('OUT')"
    )
    return f"; pickled weights are never loaded. If you trust them, convert them: python -c {code!r}"


def _indexed(path: Path) -> dict[str, str]:
    index = read_json(path)
    files = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(files, dict) or not files:
        raise InputError(f"{path}: has no weight_map")
    for file in files.values():
        if not isinstance(file, str) or not re.fullmatch(r"\w[\w.-]{0,200}\.safetensors", file):
            raise InputError(f"{path}: {shown(file)} is not the name of a safetensors file in this folder")
    if not isinstance(index.get("metadata"), dict):  # transformers reads it, and needs no more of it
        raise InputError(f"{path}: has no metadata, which is a mapping that may be empty")
    return files


@dataclass(frozen=True)
class Reach:
    """How far a model's inputs go; None where its configuration does not say it."""

    positions: int | None
    vocabulary: int | None

    @classmethod
    def of(cls, config: PreTrainedConfig) -> Reach:
        text = config.get_text_config()
        said = (getattr(text, name, None) for name in ("max_position_embeddings", "vocab_size"))
        return cls(*(number if isinstance(number, int) and number > 0 else None for number in said))

    def length(self, asked: int | None) -> int:
        """Tokens of a record: what is asked for, or the default. Raises InputError where that passes the positions."""
        if asked is None:
            return min(LENGTH, self.positions or LENGTH)
        if self.positions is not None and asked > self.positions:
            raise InputError(f"`max_length={asked}` is beyond the model's {self.positions} positions")
        return asked

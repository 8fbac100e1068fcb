"""Loading a checkpoint's model and tokenizer."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from esft.checkpoint.device import compute_dtype, placement
from esft.checkpoint.folder import Checkpoint
from esft.checkpoint.source import check_dtypes, check_folder, open_config, weight_files
from esft.checkpoint.tokenizer_files import check_tokenizer_files, flaw_of
from esft.errors import ESFTError, InputError, check_is_error, first_line
from esft.memory import check_fits, memory_watched
from esft.storage.reading import shown
from esft.transformers_internals import load_in_part

_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


def load_model(path: str, dtype: str = "auto", trust_remote_code: bool = False) -> PreTrainedModel:
    """A causal language model in evaluation mode, on the GPUs where there are any.

    Args:
        path: checkpoint folder or hub id.
        dtype: "auto" (the checkpoint's; float32 on a CPU without bf16 arithmetic), "bfloat16" or "float32".
        trust_remote_code: whether Python files of the checkpoint may be run.

    Weights are read from safetensors files only. Raises InputError when the folder is not a checkpoint, lacks a tensor
    that the model has, or does not fit the GPUs; OutOfMemory where it does not fit the machine's memory.
    """
    config = open_config(path, trust_remote_code)
    if not placement() and (folder := check_folder(path)) is not None:
        check_fits(path, sum((folder / name).stat().st_size for name in set(weight_files(folder).values())))
    return _loaded(path, AutoModelForCausalLM.from_pretrained, config, dtype, trust_remote_code)


def load_without(
    path: str,
    take_out: Callable[[PreTrainedModel], Iterable[str]],
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """``load_model`` of a part: ``take_out`` has the model before its weights are read; see ``load_in_part``."""
    config = open_config(path, trust_remote_code)
    read = partial(load_in_part, AutoModelForCausalLM, config=config, take_out=take_out)
    return _loaded(path, read, config, dtype, trust_remote_code)


def _loaded(
    path: str, read: Callable[..., Any], config: PreTrainedConfig, dtype: str, trust_remote_code: bool
) -> PreTrainedModel:
    check_dtypes(path, weight_files(path), config)
    try:
        with memory_watched(path):
            loaded = read(
                path, dtype=compute_dtype(dtype), output_loading_info=True, use_safetensors=True,
                trust_remote_code=trust_remote_code, **placement(),
            )  # fmt: skip
    except ESFTError:
        raise
    except Exception as error:  # whatever a model's constructor, a quantiser or a reader of files says
        why = _misfit(path, trust_remote_code) or f"cannot load a model ({first_line(error)})"
        raise InputError(f"{path}: {why}") from error
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise InputError(f"{path}: tensor {missing[0]} is missing ({len(missing)} missing in all)")
    if away := [name for name, parameter in model.named_parameters() if parameter.is_meta]:
        raise InputError(f"{path}: does not fit the memory of the GPUs ({away[0]} would be left outside)")
    return model.eval()


def _misfit(path: str, trust_remote_code: bool) -> str | None:
    """Which tensor of a folder is not what the configuration's model has there; None where that is not why."""
    if not os.path.isdir(path):
        return None
    try:
        return Checkpoint.open(path, trust_remote_code).misfit()
    except Exception:  # of a model that cannot be made at all: what is known already tells more
        return None


def load_skeleton(path: str, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of ``load_model`` without its weights: its modules and shapes, from the configuration alone.

    Raises InputError where that is missing or makes no model.
    """
    config = open_config(path, trust_remote_code)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever a model's constructor says of values that it cannot use
        raise InputError(f"{path}: its configuration makes no model ({first_line(error)})") from error


def load_tokenizer(path: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer. Raises InputError naming the folder, also where chat template or end token lack.

    It pads with the end token where it has no token for that.
    """
    folder = check_folder(path)
    if folder is not None and not any((folder / name).exists() for name in _TOKENIZERS):
        raise InputError(f"{path}: holds no tokenizer (no {_TOKENIZERS[0]})")
    if folder is not None:
        check_tokenizer_files(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except BaseException as error:  # a broken file is an error of any kind there
        check_is_error(error)
        where, said = path, first_line(error)
        if folder is not None and (broken := flaw_of(folder / _TOKENIZERS[0])) is not None:
            where, said = str(folder / _TOKENIZERS[0]), broken
        raise InputError(f"{where}: cannot load a tokenizer ({said})") from error
    if not tokenizer.vocab_size:  # of texts it would keep the special tokens alone
        raise InputError(f"{path}: the tokenizer has no vocabulary")
    if tokenizer.chat_template is None:
        raise InputError(f"{path}: the tokenizer has no chat template")
    template: Any = tokenizer.chat_template
    if not all(isinstance(each, str) for each in (template.values() if isinstance(template, dict) else [template])):
        raise InputError(f"{path}: the chat template is {shown(template)}, not a text")
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise InputError(f"{path}: the tokenizer has neither a token for padding nor one for the end")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer

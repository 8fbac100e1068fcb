"""Loading a checkpoint's model and tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from esft.checkpoint.device import compute_dtype, placement
from esft.checkpoint.source import check_dtypes, check_folder, open_config, weight_files
from esft.errors import InputError, first_line
from esft.transformers_internals import load_in_part

_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


def load_model(path: str, dtype: str = "auto", trust_remote_code: bool = False) -> PreTrainedModel:
    """A causal language model in evaluation mode, on the GPUs where there are any.

    Args:
        path: checkpoint folder or hub id.
        dtype: "auto" (the checkpoint's; float32 on a CPU without bf16 arithmetic), "bfloat16" or "float32".
        trust_remote_code: whether Python files of the checkpoint may be run.

    Weights are read from safetensors files only. Raises InputError when the folder is not a checkpoint, lacks a tensor
    that the model has, or does not fit the GPUs.
    """
    open_config(path, trust_remote_code)
    return _loaded(path, AutoModelForCausalLM.from_pretrained, dtype, trust_remote_code)


def load_without(
    path: str,
    take_out: Callable[[PreTrainedModel], Iterable[str]],
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """``load_model`` of a part: ``take_out`` has the model before its weights are read; see ``load_in_part``."""
    config = open_config(path, trust_remote_code)
    read = partial(load_in_part, AutoModelForCausalLM, config=config, take_out=take_out)
    return _loaded(path, read, dtype, trust_remote_code)


def _loaded(path: str, read: Callable[..., Any], dtype: str, trust_remote_code: bool) -> PreTrainedModel:
    check_dtypes(path, weight_files(path))
    try:
        loaded = read(
            path, dtype=compute_dtype(dtype), output_loading_info=True, use_safetensors=True,
            trust_remote_code=trust_remote_code, **placement(),
        )  # fmt: skip
    except InputError:
        raise
    except Exception as error:  # whatever a model's constructor, a quantiser or a reader of files says
        raise InputError(f"{path}: cannot load a model ({first_line(error)})") from error
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise InputError(f"{path}: tensor {missing[0]} is missing ({len(missing)} missing in all)")
    if away := [name for name, parameter in model.named_parameters() if parameter.is_meta]:
        raise InputError(f"{path}: does not fit the memory of the GPUs ({away[0]} would be left outside)")
    return model.eval()


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
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # a broken file is an error of any kind there
        raise InputError(f"{path}: cannot load a tokenizer ({first_line(error)})") from error
    if tokenizer.chat_template is None:
        raise InputError(f"{path}: the tokenizer has no chat template")
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise InputError(f"{path}: the tokenizer has neither a token for padding nor one for the end")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer

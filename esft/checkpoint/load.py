"""Loading a checkpoint's model and tokenizer."""

from __future__ import annotations

from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from esft.checkpoint.device import compute_dtype, placement
from esft.errors import InputError, first_line


def load_model(path: str, dtype: str = "auto") -> PreTrainedModel:
    """A causal language model in evaluation mode, on the GPUs where there are any.

    Args:
        path: checkpoint folder or hub id.
        dtype: "auto" (the checkpoint's; float32 on a CPU without bf16 arithmetic), "bfloat16" or "float32".

    Raises InputError when the folder is not a checkpoint, lacks a tensor that the model has, or does not fit the GPUs.
    """
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=compute_dtype(dtype), output_loading_info=True, **placement()
        )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise InputError(f"{path}: cannot load a model ({first_line(error)})") from error
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise InputError(f"{path}: tensor {missing[0]} is missing ({len(missing)} missing in all)")
    if away := [name for name, parameter in model.named_parameters() if parameter.is_meta]:
        raise InputError(f"{path}: does not fit the memory of the GPUs ({away[0]} would be left outside)")
    return model.eval()


def load_skeleton(path: str) -> PreTrainedModel:
    """The model of ``load_model`` without its weights: its modules and shapes, from the configuration alone.

    Raises InputError where that is missing or makes no model.
    """
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
    except Exception as error:  # whatever a configuration's validators or a model's constructor say of its values
        raise InputError(f"{path}: cannot load a model's configuration ({first_line(error)})") from error


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

"""Checkpoints that ship weights in few bits, as DeepSeek-V3 and gpt-oss do."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from esft_kernels.formats.resolve import resolve_format
from tests.esft import zoo
from tests.esft.checkpoint.files import rewrite, rewrite_json
from tests.esft.models import tiny_model, tiny_tokenizer

BLOCK = 128
SIZES = {"hidden_size": BLOCK, "moe_intermediate_size": BLOCK, "intermediate_size": 2 * BLOCK}


def fp8_checkpoint(folder: Path, **settings: object) -> Path:
    """A model whose projections are fp8 wherever 64 divides both sides, shared experts and attention included."""
    tiny_model("deepseek_v2", dtype=torch.bfloat16, **(SIZES | settings)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)

    def pack(tensors: dict[str, Tensor]) -> None:
        for name, tensor in list(tensors.items()):
            if name.endswith("proj.weight") and not any(side % (BLOCK // 2) for side in tensor.shape):
                codes, scales = resolve_format("fp8").encode(tensor.float())
                tensors[name], tensors[f"{name}_scale_inv"] = codes.contiguous(), scales

    rewrite(folder, pack)
    said = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "fmt": "e4m3", "activation_scheme": "dynamic"}
    rewrite_json(folder / "config.json", lambda config: config.update(quantization_config=said))
    return folder


def mxfp4_checkpoint(folder: Path) -> Path:
    """A small gpt-oss whose experts are mxfp4."""
    zoo.tiny("gpt_oss", hidden_size=64, intermediate_size=32, vocab_size=263).bfloat16().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)

    def pack(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if re.search(r"experts\.(gate_up|down)_proj$", name)]:
            stack = tensors.pop(name).mT
            tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = resolve_format("mxfp4").quantize(stack)

    rewrite(folder, pack)
    said = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    rewrite_json(folder / "config.json", lambda config: config.update(quantization_config=said))
    return folder

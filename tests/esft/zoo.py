"""Every model family that transformers gives the experts interface, as tiny random models.

Families are discovered in the installed transformers, so a new one is picked up by the tests; what the general recipe
for small sizes does not fit is said in ``OVERRIDES``.
"""

from __future__ import annotations

import importlib
import inspect
import re
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from tests.esft.models import draw_weights

MODELS = Path(transformers.__file__).parent / "models"
EXPERTS = 8

_SIZES = {
    "vocab_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_size": 32,
    "intermediate_size": 24,
    "moe_intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "index_topk": 4,
    "hc_mult": 2,
    "n_group": 1,
    "topk_group": 1,
    "num_expert_group": 1,
    "n_shared_experts": 1,
    "shared_expert_intermediate_size": 12,
    "moe_shared_expert_intermediate_size": 12,
    "shared_intermediate_size": 12,
    "num_experts_per_token": 3,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "mlp_layer_types": ["sparse", "sparse"],
    "linear_conv_kernel_dim": 4,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 4,
    "max_position_embeddings": 64,
    "num_experts": EXPERTS,
    "num_local_experts": EXPERTS,
    "n_routed_experts": EXPERTS,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 0,
    "attention_dropout": 0.0,
}
_FULL = ["full_attention", "full_attention"]
OVERRIDES: dict[str, dict[str, Any]] = {
    "afmoe": {"num_dense_layers": 0},
    "aria": {"moe_num_experts": EXPERTS, "moe_topk": 3, "moe_num_shared_experts": 1},
    "bailing_hybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "deepseek_v4": {
        "layer_types": ["heavily_compressed_attention", "compressed_sparse_attention"],
        "mlp_layer_types": ["hash_moe", "moe"], "o_groups": 2, "o_lora_rank": 8, "head_dim": 16,
    },
    "diffusion_gemma": {"top_k_experts": 3, "layer_types": _FULL, "per_layer_config": {}},
    "ernie4_5_moe": {"moe_num_experts": EXPERTS, "moe_k": 3, "moe_layer_start_index": 0, "moe_num_shared_experts": 1},
    "ernie4_5_vl_moe": {
        "moe_intermediate_size": [12, 8], "moe_num_experts": EXPERTS, "moe_k": 3,
        "head_dim": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    },
    "gemma4": {
        "enable_moe_block": True, "top_k_experts": 3, "vocab_size_per_layer_input": 64,
        "hidden_size_per_layer_input": 8, "layer_types": _FULL, "per_layer_config": {},
    },
    "dots3_note": {"ngram_vocab_size": 64},
    "glm4v_moe": {
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0, "mrope_section": [2, 1, 1],
        },
    },
    "glm5_next": {
        "qk_rope_head_dim": 0, "layer_types": ["linear_attention", "indexed_attention"], "index_kpool": 2,
    },
    "granitemoehybrid": {
        "layer_types": ["linear_attention", "full_attention"], "mamba_n_heads": 8, "mamba_d_head": 8,
        "mamba_d_state": 8, "mamba_chunk_size": 8,
    },
    "inkling2": {
        "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_head_dim": 8, "rel_extent": 16,
        "unpadded_vocab_size": 64,
    },
    "inkling": {"rel_extent": 16, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_head_dim": 8},
    "jamba": {
        "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 1, "expert_layer_offset": 0,
        "mamba_dt_rank": 4, "use_mamba_kernels": False,
    },
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"], "first_k_dense_replace": 0},
    "lfm2_moe": {"num_dense_layers": 0, "layer_types": ["conv", "full_attention"]},
    "mimo_v2_flash": {
        "num_key_value_heads": 2,
        "layer_types": ["full_attention", "sliding_attention"],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
            for kind in ("full_attention", "sliding_attention")
        },
    },
    "mistral4": {"head_dim": 16},
    "muse_spark": {"moe_hidden_size": 16},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"], "num_hidden_layers": 4,
        "ssm_state_size": 8, "mamba_num_heads": 4, "mamba_head_dim": 8, "n_groups": 1, "chunk_size": 8,
        "use_mamba_kernels": False,
    },
    "qwen3_5_moe": {"layer_types": ["linear_attention", "full_attention"]},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"]},
    "qwen3_omni_moe:Qwen3OmniMoeTalkerTextExperts": {"shared_expert_intermediate_size": 12},
    "qwen4_exp": {"layer_types": ["linear_attention", "linear_attention"]},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}  # fmt: skip

CLASSES = {"qwen3_omni_moe:Qwen3OmniMoeTalkerTextExperts": "Qwen3OmniMoeTalkerModel"}  # where the name does not tell


@cache
def families() -> dict[str, str]:
    """Family -> its experts class, of every modelling file that uses the decorator.

    A family is named like its file; a file with several experts classes makes several, ``file:class`` after the first.
    """
    found = {}
    for path in sorted(MODELS.glob("*/modeling_*.py")):
        classes = re.findall(
            r"^@use_experts_implementation(?:\([^)]*\))?\nclass (\w+)", path.read_text(encoding="utf-8"), re.M
        )
        family = path.stem.removeprefix("modeling_")
        found |= {f"{family}:{name}" if place else family: name for place, name in enumerate(classes)}
    return found


def _small(config_class: type[PreTrainedConfig], overrides: dict[str, Any]) -> PreTrainedConfig:
    known = set(inspect.signature(config_class.__init__).parameters) | set(vars(config_class()))
    known |= set(config_class.attribute_map)
    sizes = {name: value for name, value in _SIZES.items() if name in known}
    return config_class(**(sizes | overrides))


def model_class(family: str) -> type[PreTrainedModel]:
    """The smallest class of a family's file that holds a language model: with a head where there is one."""
    file = family.partition(":")[0]
    module = importlib.import_module(f"transformers.models.{file}.modeling_{file}")
    if family in CLASSES:
        return getattr(module, CLASSES[family])
    classes = [
        c for c in vars(module).values()
        if inspect.isclass(c) and issubclass(c, PreTrainedModel) and c.__module__ == module.__name__
    ]  # fmt: skip
    for ending in ("ForCausalLM", "TextModel", "ForTokenClassification", "Model"):
        for c in classes:
            if c.__name__.endswith(ending) and not c.__name__.endswith("PreTrainedModel"):
                return c
    raise LookupError(f"{family}: no model class")


def tiny(family: str, **settings: Any) -> PreTrainedModel:
    """A random model of a family, in float32; the same weights at every call."""
    torch.manual_seed(0)
    cls = model_class(family)
    config = _small(cls.config_class, OVERRIDES.get(family, {}) | settings)
    model = cls._from_config(config) if hasattr(cls, "_from_config") else cls(config)
    draw_weights(model)
    for name, buffer in model.named_buffers():
        if name.endswith("tid2eid"):  # token -> experts, of a router that hashes
            buffer.copy_(torch.stack([torch.randperm(EXPERTS)[: buffer.shape[1]] for _ in buffer]))
    return model.eval()


def tokens(rows: int = 2, length: int = 9) -> torch.Tensor:
    """Random tokens, none of them special."""
    return torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(1))

"""Tiny random models of every supported family, a tokenizer, and records, all built on the spot."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from esft.data.encoding import Encoder
from esft.data.records import Record

_SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}
_MLA = {"q_lora_rank": None, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
_DEEPSEEK = _MLA | {
    "moe_intermediate_size": 20,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
}
_QWEN = {"moe_intermediate_size": 20, "num_experts": 8, "num_experts_per_tok": 3, "decoder_sparse_step": 1}

# family -> (config, index of the first MoE layer)
FAMILIES: dict[str, tuple[dict, int]] = {
    "deepseek_v2": (_DEEPSEEK | {"topk_method": "group_limited_greedy", "routed_scaling_factor": 2.0}, 1),
    "deepseek_v3": (_DEEPSEEK | {"norm_topk_prob": True, "routed_scaling_factor": 2.5}, 1),
    "qwen2_moe": (_QWEN | {"shared_expert_intermediate_size": 24, "norm_topk_prob": False}, 0),
    "qwen3_moe": (_QWEN | {"head_dim": 8, "norm_topk_prob": True}, 0),
    "olmoe": ({"num_experts": 8, "num_experts_per_tok": 3}, 0),
    "mixtral": ({"num_local_experts": 8, "num_experts_per_tok": 2}, 0),
}


def tiny_model(
    family: str = "deepseek_v2", seed: int = 0, dtype: torch.dtype = torch.float32, **settings: Any
) -> PreTrainedModel:
    """A random model with 8 experts in its MoE layers; every weight, router included, is large enough to matter."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(_SIZES | FAMILIES[family][0] | settings)))
    draw_weights(model)
    return model.to(dtype).eval()


@torch.no_grad()
def draw_weights(model: PreTrainedModel) -> None:
    """Random weights that are large enough to matter, those of routers above all."""
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=0.5 if re.search(r"gate\.weight|router", name) else 0.1)
    for name, buffer in model.named_buffers():
        if "correction_bias" in name:
            buffer.normal_(std=0.2)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|bos|>", "<|end|>", "<|pad|>", "<|user|>", "<|assistant|>", "<|system|>"]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|bos|>",
        eos_token="<|end|>",
        pad_token="<|pad|>",
        chat_template=(
            "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>{% endif %}"
        ),
    )


def save_tiny(folder: Path, family: str = "deepseek_v2", seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """A checkpoint folder with model and tokenizer."""
    tiny_model(family, seed, dtype).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def chat(prompt: str, reply: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]


def record(prompt: str, reply: str) -> Record:
    return Record(chat(prompt, reply))


def tiny_encoder(max_length: int = 99, **settings: Any) -> Encoder:
    return Encoder(tiny_tokenizer(), max_length, **settings)


def write_records(path: Path, count: int = 24) -> Path:
    """Records that a tiny model can learn a little of: the answer is the prompt's last letter, three times."""
    letters = "abcdefgh"
    lines = [chat(f"say {letters[i % 8]}", letters[i % 8] * 3) for i in range(count)]
    path.write_text("".join(json.dumps({"messages": m}) + "\n" for m in lines), encoding="utf-8")
    return path


def token_batch(rows: int = 3, length: int = 17, seed: int = 1) -> dict[str, torch.Tensor]:
    """Random tokens; the last row is padded on the right by 5."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[-1, -5:] = 0
    return {"input_ids": torch.randint(0, 256, (rows, length), generator=generator), "attention_mask": mask}


def adds_a_start(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """As many tokenizers do to a text by itself."""
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", tokenizer.bos_token_id)]
    )
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    return tokenizer


def record_generate(model: PreTrainedModel) -> list[dict[str, Any]]:
    """What the model is told to generate, call by call, from now on; it says "a"."""
    calls = []

    def generate(**options):
        calls.append(options)
        rows, length = options["input_ids"].shape
        return torch.full((rows, length + 1), 64)

    model.generate = generate
    return calls


def conversation(prompt: str) -> Record:
    return Record(chat(prompt, "")[:1])

"""A few training steps of the stock model, as a user would write them: transformers, and PEFT for LoRA.

Run as a process of its own by ``benchmarks scale``: ``python -m benchmarks.stock_training --model M --data D ...``. The
last line of its output is the tokens a second of the steps after the first.
"""

from __future__ import annotations

import argparse
import time
from itertools import islice

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from esft.adapters.lora import add_lora
from esft.data.sources import read_records
from esft.runs.config import TrainConfig


def steps(model_path: str, data: str, method: str, count: int, records: int, length: int) -> float:
    """Tokens a second of ``count`` steps of so many records each, the first of which is not counted."""
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    texts = [tokenizer.apply_chat_template(record.messages, tokenize=False) for record in read_records(data)]
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype="auto", experts_implementation="grouped_mm")
    usual = TrainConfig()
    trained = add_lora(model, usual.lora_rank, usual.lora_alpha) if method == "lora" else model.train()
    optimizer = torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad], lr=1e-5, foreach=False)
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"][:length] for text in texts]
    begun, tokens, batches = 0.0, 0, iter(ids)
    for step in range(count):
        if step == 1:
            begun = time.monotonic()
        batch = torch.tensor(list(islice(batches, records)))  # records reach the length, so none is padded
        trained(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        tokens += batch.numel() if step else 0
    return tokens / (time.monotonic() - begun)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--method", choices=("full", "lora"), required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--records", type=int, required=True)
    parser.add_argument("--length", type=int, required=True)
    args = parser.parse_args()
    print(steps(args.model, args.data, args.method, args.steps, args.records, args.length))


if __name__ == "__main__":
    main()

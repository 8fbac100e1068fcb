"""The small model's tokenizer: byte-level BPE trained on the corpus, with a chat template.

python -m examples.pretrain.tokenizer --work DIR      writes DIR/tokenizer/
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 8192
SPECIAL = ["<|bos|>", "<|end|>", "<|user|>", "<|assistant|>", "<|pad|>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# Words keep their leading space; digits and punctuation stand alone, so that numbers and JSON are copied
# symbol by symbol instead of by memorised clusters.
SPLIT = Regex(r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]|\s+(?!\S)|\s+")


def train_tokenizer(texts: Iterator[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of VOCAB_SIZE tokens, special tokens included."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(SPLIT, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|bos|>",
        eos_token="<|end|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def sample_texts(work: Path, megabytes: float, instructions: int) -> Iterator[str]:
    """An even share of every text domain, and some instruction records."""
    files = sorted((work / "text").glob("*.train.jsonl"))
    share = megabytes * 1e6 / len(files)
    for path in files:
        lines = path.read_text(encoding="utf-8").splitlines()
        random.Random(0).shuffle(lines)
        used = 0
        for line in lines:
            text = json.loads(line)["text"]
            used += len(text)
            if used > share:
                break
            yield text
    with open(work / "instructions.train.jsonl", encoding="utf-8") as handle:
        for _, line in zip(range(instructions), handle, strict=False):
            yield from (m["content"] for m in json.loads(line)["messages"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    args = parser.parse_args()
    tokenizer = train_tokenizer(sample_texts(args.work, megabytes=12, instructions=20_000))
    tokenizer.save_pretrained(args.work / "tokenizer")
    print(f"{len(tokenizer)} tokens in {args.work / 'tokenizer'}")


if __name__ == "__main__":
    main()

"""What a model should still know after fine-tuning: held-out general data, from what lies on the machine.

Three parts that the base model's training never saw: the descriptions that installed packages carry (English prose),
the source of packages that its corpus left out, and held-out instructions of its own kinds.

    python -m examples.general --out general.jsonl
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Iterator, Sequence
from importlib.metadata import distributions
from pathlib import Path
from random import Random

from esft.data.encoding import Encoder
from esft.data.examples import Example
from esft.data.records import Record
from examples.pretrain.instruction_words import Lexicon
from examples.pretrain.instructions import record

# Not in examples/pretrain/corpus.py's CODE.
CODE = ("absl", "accelerate", "h11", "peft", "pyparsing", "safetensors", "tqdm", "yaml")
PIECE, PIECES, INSTRUCTIONS = 1500, 60, 200  # characters of a text, texts of a part, instruction records


def descriptions() -> Iterator[str]:
    """Long descriptions of the installed packages but our own, by name."""
    for distribution in sorted(distributions(), key=lambda d: str(d.metadata["Name"]).lower()):
        if distribution.metadata["Name"] == "esft":  # or the measure would change with our README
            continue
        text = str(distribution.metadata.get_payload() or distribution.metadata.get("Description") or "")
        if len(text) > PIECE // 2:
            yield text[:PIECE]


def sources() -> Iterator[str]:
    """Pieces of source files of packages that the corpus left out, spread evenly; licence headers are passed over."""
    files = []
    for name in CODE:
        spec = importlib.util.find_spec(name)
        for root in (spec.submodule_search_locations or []) if spec else []:
            files += sorted(Path(root).rglob("*.py"))
    files = [file for file in files if file.stat().st_size > 2 * PIECE]
    for file in files[:: max(1, len(files) // PIECES)]:
        yield file.read_text(encoding="utf-8", errors="replace")[PIECE // 2 : PIECE // 2 * 3]


def build() -> list[dict]:
    """Records with a part's name and either a text or messages."""
    rng, lexicon = Random(0), Lexicon()
    texts = [("prose", text) for text in list(descriptions())[:PIECES]]
    texts += [("code", text) for text in list(sources())[:PIECES]]
    records: list[dict] = [{"part": part, "text": text} for part, text in texts]
    for _ in range(INSTRUCTIONS):
        records.append({"part": "instructions", "messages": record(rng, lexicon, split="heldout")["messages"]})
    return records


def encode_general(tokenizer, records: list[dict], max_length: int = 512) -> dict[str, list[Example]]:
    """Examples of each part; every token of a text counts, and the assistant turns of instructions."""
    parts: dict[str, list[Example]] = {}
    for item in records:
        if "messages" in item:
            example = Encoder(tokenizer, max_length).encode(Record(item["messages"]))
        else:
            ids = [tokenizer.bos_token_id, *tokenizer(item["text"], add_special_tokens=False)["input_ids"]]
            example = Example(ids[:max_length], ids[:max_length])
        parts.setdefault(item["part"], []).append(example)
    return parts


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in build()), encoding="utf-8")
    print(f"{args.out} written")


if __name__ == "__main__":
    main()
